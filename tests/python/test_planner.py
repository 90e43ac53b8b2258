"""The plan of an iteration, and the lessons of past ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from spmoe.costs.costs import Costs
from spmoe.decoding.planner import PLAIN_FIRST, Plan, Planner
from spmoe.decoding.prior import Choice, Shape
from spmoe.policies import traits_of
from spmoe.reporting.counters import Counters

MIB = 1 << 20
COSTS = Costs(
    draft_s=0.020, layer_s={1: 0.005}, copy_s={8: 0.008}, expert_bytes=16 * MIB, prefetch_s=0.0002
)
# Ten layers of eight experts, half of them in memory. Five tokens of uniform routing need 6.1
# experts of a layer, 30.5 fills in all; a fill takes 1 ms.
SHAPE = Shape(layers=10, experts=8, experts_per_token=2, memory_bytes=40 * 16 * MIB)
FILLS = 10 * 8 * (1 - 0.75**5) / 2


@dataclass
class Iteration:
    drafted: int = 4
    accepted: int = 2
    pass_s: Sequence[float] = (0.020,) * 4
    verify_s: float = 0.100
    unread: int = 0
    probabilities: Sequence[float] = ()
    reread: int = 0

    @property
    def draft_s(self) -> float:
        return sum(self.pass_s)

    @property
    def rows(self) -> int:
        return self.reread + 1 + self.drafted


ALONE = Iteration(drafted=0, accepted=0, pass_s=(), verify_s=0.050)


def planner(*, policy: str = "sp-moe", costs: Costs = COSTS, **shape: Any) -> Planner:
    return Planner(costs, replace(SHAPE, **shape), policy=traits_of(policy))


def grown(
    fills: float = 0,
    *,
    stall_s: float = 0.0,
    needs: int = 0,
    recalled: int = 0,
    critical: int | None = None,  # None: those that came true
) -> Counters:
    return Counters(
        link_bytes=round(fills * 16 * MIB),
        stall_s=stall_s,
        predicted_accesses=needs,
        recalled=recalled,
        critical=recalled if critical is None else critical,
    )


def observe(it: Planner, iteration: Any, counted: Counters, *, read_last: bool) -> None:
    plan = Plan(Choice(iteration.drafted, prefetch=True), read_last)
    it.observe(plan, iteration, counted)


class TestLimits:
    def test_the_budget_grows_by_what_the_link_moves_while_a_layer_runs(self) -> None:
        budget = planner().plan((4,)).budget_bytes
        assert budget[0] == pytest.approx(80 * 16 * MIB)  # four draft steps of 20 ms, 1 ms each
        assert budget[1] - budget[0] == pytest.approx(5 * 16 * MIB)

    def test_without_drafting_the_first_layer_can_await_nothing(self) -> None:
        assert planner(policy="horizon").plan((0,)).budget_bytes[0] == 0
        assert planner(policy="sp-moe").plan((0,)) == Plan(Choice(0, prefetch=False))

    def test_it_breaks_even_where_what_a_prefetch_takes_is_what_it_saves(self) -> None:
        assert planner().plan((4,)).break_even == pytest.approx(0.2)
        for policy in ("sp-moe", "horizon"):
            never = planner(policy=policy, costs=replace(COSTS, prefetch_s=0.001)).plan((4,))
            assert (never.break_even, never.cutoff_layer) == (1, 0)

    def test_predictions_are_of_use_where_something_may_be_prefetched(self) -> None:
        shallow = planner(memory_bytes=10 * 16 * MIB).plan((4,))
        assert shallow.cutoff_layer == 1
        assert [shallow.uses_prediction(traits_of("sp-moe"), layer) for layer in (0, 1)] == [
            True,
            False,
        ]
        assert planner(policy="horizon").plan((4,)).uses_prediction(traits_of("horizon"), 9)
        never = planner(costs=replace(COSTS, prefetch_s=0.001)).plan((4,))
        assert not never.uses_prediction(traits_of("horizon"), 0)
        assert never.uses_prediction(traits_of("next-gate"), 0)  # which knows no limits


class TestCutoff:
    def test_it_counts_the_fills_that_iterations_really_need(self) -> None:
        it = planner()
        observe(it, Iteration(), grown(fills=300), read_last=False)  # 30 a layer
        assert it.plan((4,)).cutoff_layer == 1  # memory: 40 experts
        for _ in range(60):
            observe(it, Iteration(), grown(fills=30), read_last=False)
        assert it.plan((4,)).cutoff_layer == 10

    def test_it_learns_from_predictions_that_were_wrong(self) -> None:
        cutoffs = []
        for recalled, critical in ((100, 100), (50, 200)):
            it = planner(memory_bytes=79 * 16 * MIB)
            for _ in range(60):  # 40 fills a layer take longer than the layer
                observe(
                    it,
                    Iteration(),
                    grown(fills=400, needs=100, recalled=recalled, critical=critical),
                    read_last=False,
                )
            it.shape = replace(it.shape, memory_bytes=1 << 40)
            cutoffs.append(it.plan((4,)).cutoff_layer)
        assert cutoffs == [10, 1]

    def test_before_any_iteration_fills_are_those_of_uniform_routing(self) -> None:
        assert planner().plan((4,)).cutoff_layer == 10
        assert planner(memory_bytes=10 * 16 * MIB).plan((4,)).cutoff_layer == 1  # 5.3 a layer

    def test_the_papers_rule_admits_what_arrives_while_drafting_and_fits(self) -> None:
        it = planner()
        it.cutoff_rule = "paper"
        assert it.plan((4,)).cutoff_layer == 10  # 80 ms: 40 layers of two experts in 1 ms each
        slow = planner(costs=replace(COSTS, copy_s={8: 0.064}))
        slow.cutoff_rule = "paper"
        assert slow.plan((4,)).cutoff_layer == 5  # of 16 ms
        small = planner(memory_bytes=7 * 16 * MIB)
        small.cutoff_rule = "paper"
        assert small.plan((4,)).cutoff_layer == 3


class TestCosts:
    def test_compute_follows_what_was_measured_without_the_waits(self) -> None:
        it = planner(costs=replace(COSTS, layer_s={1: 0.004, 5: 0.008}))
        observe(it, Iteration(verify_s=0.240), grown(stall_s=0.080), read_last=False)
        assert it.costs.layer_at(5) == pytest.approx(0.016)
        assert it.costs.layer_at(1) == pytest.approx(0.008)  # in proportion

    def test_draft_steps_follow_what_was_measured(self) -> None:
        it = planner()
        for _ in range(60):
            observe(it, Iteration(pass_s=(0.010,) * 4), grown(), read_last=False)
        assert it.costs.draft_s == pytest.approx(0.010, rel=1e-3)
        long = Iteration(drafted=2, pass_s=(5.0, 0.010), unread=100)
        observe(it, long, grown(), read_last=False)
        assert it.costs.draft_s == pytest.approx(0.010, rel=1e-3)  # reading a prompt is no step

    def test_a_prompt_teaches_nothing(self) -> None:
        it = planner()
        observe(it, Iteration(drafted=32, verify_s=9.0), grown(fills=80), read_last=False)
        assert it.costs == COSTS
        assert it.lengths.count == 0

    def test_experts_that_cost_nothing_to_copy_divide_nothing(self) -> None:
        free = replace(COSTS, copy_s={8: 0.0}, prefetch_s=0.0, layer_s={1: 0.0}, draft_s=0.0)
        it = planner(costs=free, memory_bytes=1 << 40, policy="horizon")
        for lengths in ((0, 4), (4,)) * 3:
            plan = it.plan(lengths)
            it.observe(plan, Iteration(pass_s=(0.0,) * 4), grown(fills=10, stall_s=0.001))
        assert it.plan((4,)).break_even == 1


class TestDraftLength:
    def test_an_engine_decodes_plainly_before_it_drafts(self) -> None:
        it = planner(costs=replace(COSTS, layer_s={1: 0.050}))  # drafting pays
        chosen = []
        for _ in range(PLAIN_FIRST + 1):
            plan = it.plan(range(5))
            chosen.append(plan.choice.length)
            it.observe(plan, replace(ALONE, verify_s=0.510), grown(fills=10))
        assert chosen[:PLAIN_FIRST] == [0] * PLAIN_FIRST
        assert chosen[-1] > 0

    def test_a_fixed_length_is_kept_from_the_first_iteration_on(self) -> None:
        it = planner()
        for _ in range(100):
            plan = it.plan((4,))
            assert plan.choice == (4, True)
            it.observe(plan, Iteration(), grown(fills=30))

    def test_reading_unread_tokens_is_no_part_of_what_a_length_takes(self) -> None:
        it = planner()
        choice = Choice(2, prefetch=True)
        usual = Iteration(drafted=2, pass_s=(0.020, 0.020), verify_s=0.060)
        for _ in range(60):
            observe(it, replace(usual, unread=100, pass_s=(2.020, 0.020)), grown(), read_last=False)
        assert it.lengths.seconds(choice) == pytest.approx(0.100, rel=0.01)

    def test_a_prompt_that_costs_more_than_drafts_can_save_is_left_unread(self) -> None:
        costs = replace(COSTS, layer_s={1: 0.050}, draft_token_s=0.020)
        for left, drafts in ((10, False), (10_000, True)):
            it = planner(costs=costs)
            for _ in range(PLAIN_FIRST):
                it.observe(it.plan(range(5)), replace(ALONE, verify_s=0.510), grown(fills=10))
            assert (it.plan(range(5), unread=1000, left=left).choice.length > 0) == drafts

    def test_what_was_measured_is_what_is_chosen_by(self) -> None:
        """Whatever the profile says of this pair: a row more costs a pass more here."""
        it = planner(costs=replace(COSTS, layer_s={1: 0.050}), policy="on-demand")
        drafted = []
        for _ in range(200):
            plan = it.plan(range(9))
            length = plan.choice.length
            drafted.append(length)
            took = Iteration(length, 0, (0.1,) * length, verify_s=0.5 * (length + 1))
            it.observe(plan, took, grown(fills=10))
        assert drafted[100:].count(0) > 90


class TestReadingTheLastToken:
    def test_it_is_not_tried_before_recall_without_it_is_known(self) -> None:
        assert not planner().plan((4,)).read_last

    def test_it_is_tried_where_all_that_was_missed_costs_more_than_a_step(self) -> None:
        it = planner(policy="horizon")
        observe(it, Iteration(), grown(fills=250, needs=100, recalled=90), read_last=False)
        plan = it.plan((4,))
        assert plan.read_last  # a tenth of 250 fills of 1 ms against 20 ms
        assert plan.budget_bytes[0] == pytest.approx(5 * 20 * 16 * MIB)
        assert not it.plan((0,)).read_last

    def test_it_is_given_up_where_it_foresees_no_more(self) -> None:
        it = planner()
        observe(it, Iteration(), grown(fills=250, needs=100, recalled=90), read_last=False)
        observe(it, Iteration(), grown(fills=250, needs=100, recalled=91), read_last=True)
        assert not it.plan((4,)).read_last

    def test_a_fast_link_has_no_use_for_it(self) -> None:
        it = planner()
        observe(it, Iteration(), grown(fills=50, needs=100, recalled=90), read_last=False)
        assert not it.plan((4,)).read_last

    def test_a_policy_without_limits_has_no_use_for_it(self) -> None:
        it = planner(policy="next-gate")
        observe(it, Iteration(), grown(fills=250, needs=100, recalled=90), read_last=False)
        assert it.plan((4,)) == Plan(Choice(4, prefetch=False))
