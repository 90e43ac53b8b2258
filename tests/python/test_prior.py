"""The expected time of an iteration, by the profile alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from spmoe.costs.costs import Costs
from spmoe.decoding.prior import Choice, Shape, choices, expected_fills, expected_s
from spmoe.policies import traits_of

MIB = 1 << 20
COSTS = Costs(
    draft_s=0.020, layer_s={1: 0.005}, copy_s={8: 0.008}, expert_bytes=16 * MIB, prefetch_s=0.0002
)
SHAPE = Shape(layers=10, experts=8, experts_per_token=2, memory_bytes=40 * 16 * MIB)  # half


class TestFills:
    @pytest.mark.parametrize(("rows", "distinct"), [(1, 2.0), (2, 3.5), (5, 6.1016)])
    def test_tokens_need_distinct_experts_of_uniform_routing(
        self, rows: int, distinct: float
    ) -> None:
        assert expected_fills(COSTS, SHAPE, rows) == pytest.approx(10 * distinct / 2, rel=1e-4)

    def test_nothing_is_missing_where_everything_fits(self) -> None:
        assert expected_fills(COSTS, replace(SHAPE, memory_bytes=1 << 40), 5) == 0


class TestSeconds:
    def test_every_fill_that_is_not_prefetched_is_waited_for(self) -> None:
        for length, fills in ((0, 10), (4, 30.508)):
            compute_s = length * 0.020 + 10 * 0.005
            found = expected_s(COSTS, SHAPE, Choice(length, prefetch=False))
            assert found == pytest.approx(compute_s + fills * 0.001, rel=1e-4)

    def test_prefetches_hide_behind_compute_and_slow_it(self) -> None:
        found = expected_s(COSTS, SHAPE, Choice(4, prefetch=True))
        assert found == pytest.approx(0.080 + 0.050 + 30.508 * 0.0002, rel=1e-4)

    def test_a_link_that_is_slower_than_compute_sets_the_time(self) -> None:
        slow = replace(COSTS, copy_s={8: 0.8})
        found = expected_s(slow, SHAPE, Choice(4, prefetch=True))
        assert found == pytest.approx(3.0508, rel=1e-4)


class TestChoices:
    def arms(self, prefetch_s: float, policy: str = "horizon", length: int = 4) -> list[bool]:
        costs = replace(COSTS, prefetch_s=prefetch_s)  # a copy takes 1 ms
        return [choice.prefetch for choice in choices(costs, traits_of(policy), [length])]

    def test_a_cheap_prefetch_is_always_made(self) -> None:
        assert self.arms(0.0) == [True]
        assert self.arms(0.00025) == [True]

    def test_a_prefetch_that_takes_as_much_as_it_saves_is_never_made(self) -> None:
        assert self.arms(0.001) == [False]
        assert self.arms(0.005) == [False]

    def test_between_them_both_are_measured(self) -> None:
        assert self.arms(0.0003) == [True, False]
        assert self.arms(0.0009) == [True, False]

    def test_a_policy_that_predicts_nothing_has_no_choice(self) -> None:
        assert self.arms(0.0, "on-demand") == [False]
        assert self.arms(0.0, "next-gate") == [False]
        assert self.arms(0.0, "sp-moe", length=0) == [False]  # predictions of the draft alone
        assert self.arms(0.0, "sp-moe", length=1) == [True]
        assert self.arms(0.0, "horizon", length=0) == [True]

    def test_a_link_without_cost_is_not_prefetched_for(self) -> None:
        free = replace(COSTS, copy_s={8: 0.0}, prefetch_s=0.0)
        assert choices(free, traits_of("horizon"), [0, 2]) == [(0, False), (2, False)]
