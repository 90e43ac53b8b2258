"""The latency model: deadlines, budgets and the paper's cutoff layer."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest

from spmoe.costs.costs import Costs, interpolate
from spmoe.costs.cutoff import (
    break_even,
    byte_budget,
    cutoff_layer,
    deadlines,
    paper_cutoff_layer,
    waits_s,
)

MIB = 1 << 20


def costs(**changed: Any) -> Costs:
    """A draft step of 20 ms, a layer of 5 ms, an expert of 16 MiB in 1 ms whatever the batch."""
    base = {
        "draft_s": 0.020,
        "layer_s": {1: 0.005},
        "copy_s": {1: 0.001, 8: 0.008},
        "expert_bytes": 16 * MIB,
    }
    return Costs(**(base | changed))


class TestInterpolate:
    @pytest.mark.parametrize(
        ("samples", "at", "expected"),
        [
            ({3: 7.0}, 1, 7.0),  # one sample: a constant
            ({3: 7.0}, 9, 7.0),
            ({1: 1.0, 5: 3.0}, 1, 1.0),  # at the samples
            ({1: 1.0, 5: 3.0}, 5, 3.0),
            ({1: 1.0, 5: 3.0}, 3, 2.0),  # between
            ({5: 3.0, 1: 1.0}, 3, 2.0),  # in any order
            ({1: 1.0, 5: 3.0}, 9, 5.0),  # past the end
            ({2: 1.0, 4: 3.0}, 1, 0.0),  # before the start
            ({2: 1.0, 4: 9.0}, 1, 0.0),  # never negative
            ({1: 1.0, 2: 5.0, 4: 6.0}, 2, 5.0),
            ({1: 1.0, 2: 5.0, 4: 6.0}, 3, 5.5),  # of several lines the right one
            ({1: 1.0, 2: 5.0, 4: 6.0}, 8, 8.0),
        ],
    )
    def test_it_lies_on_the_lines_through_the_samples(
        self, samples: dict[int, float], at: int, expected: float
    ) -> None:
        assert interpolate(samples, at) == pytest.approx(expected)


class TestCosts:
    @pytest.mark.parametrize(
        "changed",
        [
            {"draft_s": math.nan},
            {"draft_s": -0.001},
            {"draft_s": math.inf},
            {"layer_s": {}},
            {"layer_s": {1: 0.005, 4: math.nan}},
            {"copy_s": {}},
            {"copy_s": {1: 0.001, 8: -0.008}},
            {"copy_s": {8: math.inf}},
            {"expert_bytes": 0},
            {"expert_bytes": -1},
        ],
    )
    def test_unmeasured_costs_are_refused_with_the_cure(self, changed: dict[str, Any]) -> None:
        with pytest.raises(
            ValueError, match=r"must be measured and non-negative.*run `spmoe profile`"
        ):
            costs(**changed)

    def test_an_expert_on_the_link_is_a_batchs_share(self) -> None:
        batches = costs(copy_s={1: 0.002, 8: 0.008})
        assert batches.expert_copy_s(1) == pytest.approx(0.002)
        assert batches.expert_copy_s() == pytest.approx(0.001)

    def test_of_a_layer_of_few_experts_the_largest_batch_counts(self) -> None:
        assert costs(copy_s={4: 0.008}).expert_copy_s() == pytest.approx(0.002)

    def test_a_layer_costs_more_with_more_rows(self) -> None:
        assert costs(layer_s={1: 0.005, 5: 0.009}).layer_at(3) == pytest.approx(0.007)


class TestDeadlines:
    @pytest.mark.parametrize(
        ("draft_steps", "rows", "expected"),
        [
            (0, 1, [0.0, 0.005, 0.010]),  # verification begins now
            (1, 1, [0.020, 0.025, 0.030]),
            (4, 5, [0.080, 0.089, 0.098]),  # of five rows a layer takes 9 ms
        ],
    )
    def test_a_layer_is_due_after_drafting_and_the_layers_before_it(
        self, draft_steps: int, rows: int, expected: list[float]
    ) -> None:
        measured = costs(layer_s={1: 0.005, 5: 0.009})
        due = deadlines(measured, draft_steps=draft_steps, rows=rows, layer_count=3)
        assert due == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"rows": 0}, "rows must be at least 1, got 0"),
            ({"layer_count": 0}, "layer_count must be at least 1, got 0"),
            ({"draft_steps": -1}, "draft_steps must not be negative, got -1"),
        ],
    )
    def test_a_count_that_cannot_be_is_refused(self, changed: dict[str, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            deadlines(costs(), **({"draft_steps": 1, "rows": 1, "layer_count": 3} | changed))


class TestByteBudget:
    def test_it_is_what_the_link_moves_until_the_deadline(self) -> None:
        assert byte_budget([0.0, 0.0005, 0.003], costs()) == [0, 8 * MIB, 48 * MIB]

    def test_a_free_link_sets_no_bound(self) -> None:
        budget = byte_budget([0.0, 1.0], costs(copy_s={8: 0.0}))
        assert min(budget) > 1 << 60
        assert max(budget) < 1 << 64  # the runtime keeps it in 64 bits


class TestCutoffLayer:
    TICK = 2.0**-10  # seconds that an expert takes on the link: sums of it do not round

    def cutoff(self, due: Sequence[float], wanted: Sequence[float], **changed: Any) -> int:
        """Return the cutoff layer of deadlines in ticks, with room for everything."""
        seconds = [time * self.TICK for time in due]
        measured = costs(copy_s={8: 8 * self.TICK})
        return cutoff_layer(
            waits_s(seconds, wanted, measured, **({"free_bytes": 1 << 40} | changed))
        )

    @pytest.mark.parametrize(
        ("due", "wanted", "experts", "expected"),
        [
            ([20] * 26, [2] * 26, 999, 10),  # time: 20 / 2
            ([20] * 26, [2] * 26, 6, 3),  # memory: 6 / 2
            ([20] * 26, [2] * 26, 0, 0),
            ([999] * 26, [2] * 26, 999, 26),  # never past the last layer
            ([0] * 4, [1] * 4, 999, 0),
            ([0] * 4, [0] * 4, 0, 0),  # nothing to fill: nothing to prefetch
            ([21] * 26, [2] * 26, 999, 11),  # one expert of the eleventh has arrived
            ([2, 2, 10], [2, 1, 1], 999, 3),  # the second gains nothing, the third does
            ([0, 10, 10], [0, 5, 6], 999, 3),  # the last waits for one of six
            ([4.5], [4.5], 999, 1),  # expected counts need not be whole
            ([], [], 0, 0),
            # Late from the first on, but the link works while a layer computes.
            ([1, 2, 3, 4], [2, 2, 2, 2], 999, 4),
            # Room for two layers: the third is begun when the first has run.
            ([10, 20, 30, 40], [2, 2, 2, 2], 4, 4),
            ([10, 10, 10, 10], [2, 2, 2, 2], 4, 2),  # no sooner than a demand
            ([10, 20, 30], [2, 2, 5], 4, 2),  # more than there is room for
        ],
    )
    def test_it_is_as_deep_as_prefetches_are_waited_for_less_than_demands(
        self, due: list[float], wanted: list[float], experts: int, expected: int
    ) -> None:
        assert self.cutoff(due, wanted, free_bytes=experts * 16 * MIB) == expected

    @pytest.mark.parametrize(
        ("recall", "predicted", "expected"),
        [
            (1.0, 1.0, 26),  # the fifth layer and all after it are late, by a tick each
            (0.75, 0.75, 26),  # what is missed costs the same as on demand
            (0.75, 1.125, 26),  # wrong ones take three quarters of a layer's compute
            (0.75, 1.375, 5),  # more than that: as deep as drafting moves
            (0.75, 2.0, 3),
            (0.125, 1.0, 8),  # hardly any is right: while the link has nothing else to do
            (0.0, 1.0, 0),
            (0.0, 0.0, 0),
        ],
    )
    def test_wrong_predictions_make_it_shallow(
        self, recall: float, predicted: float, expected: int
    ) -> None:
        due = [9 + layer for layer in range(26)]
        assert self.cutoff(due, [2] * 26, recall=recall, predicted=predicted) == expected

    def test_over_the_cutoff_waits_are_a_u(self) -> None:
        """SP-MoE's figure of TPOT over L: deeper saves waits, until wrong ones hold the link up."""
        due = [(9 + layer) * self.TICK for layer in range(10)]
        measured = costs(copy_s={8: 8 * self.TICK})
        found = waits_s(due, [2] * 10, measured, free_bytes=1 << 40, recall=0.75, predicted=1.375)
        ticks = [wait_s / self.TICK for wait_s in found]
        assert ticks == [20, 18.5, 17, 15.5, 14, 13.25, 13.5, 13.75, 14, 14.25, 14.5]

    def test_a_free_link_needs_room_for_a_layer_alone(self) -> None:
        free_link = costs(copy_s={8: 0.0})
        assert waits_s([0.0] * 26, [2] * 26, free_link, free_bytes=32 * MIB) == [0.0] * 27
        assert waits_s([0.0] * 26, [2] * 26, free_link, free_bytes=31 * MIB) == [0.0]

    @pytest.mark.parametrize(
        ("due", "wanted", "free_bytes"),
        [([0.1], [1, 1], 0), ([0.1, 0.1], [1, -1], 0), ([0.1], [1], -1), ([0.1], [math.nan], 0)],
    )
    def test_lists_that_do_not_fit_are_refused(
        self, due: list[float], wanted: list[float], free_bytes: int
    ) -> None:
        with pytest.raises(ValueError, match="as many deadlines as non-negative counts"):
            waits_s(due, wanted, costs(), free_bytes=free_bytes)

    @pytest.mark.parametrize(
        ("recall", "predicted"),
        [(0.9, 0.8), (1.1, 2.0), (-0.1, 1.0), (math.nan, 1.0), (0, math.inf)],
    )
    def test_shares_that_cannot_be_are_refused(self, recall: float, predicted: float) -> None:
        with pytest.raises(ValueError, match=r"a recall in \[0, 1\] of no more than is predicted"):
            waits_s([0.1], [1], costs(), free_bytes=0, recall=recall, predicted=predicted)

    def test_equal_layers_without_compute_give_the_papers_closed_form(self) -> None:
        """L k copy <= T_draft and L k bytes <= free: SP-MoE, section 3.2.

        A layer whose copies have begun when verification begins counts too.
        """
        for seed in range(200):
            rng = random.Random(seed)
            layers, k, steps = rng.randint(1, 60), rng.randint(1, 8), rng.randint(1, 8)
            free_bytes = rng.randint(0, layers * k * 16 * MIB * 2)
            # Powers of two, so that neither side rounds.
            copy_s, draft_s = 2.0 ** -rng.randint(8, 12), rng.randint(1, 64) * 2.0**-10
            measured = costs(draft_s=draft_s, layer_s={1: 0.0}, copy_s={8: 8 * copy_s})
            due = deadlines(measured, draft_steps=steps, rows=steps + 1, layer_count=layers)
            by_time = math.ceil(steps * draft_s / (k * copy_s))
            by_memory = free_bytes // (k * 16 * MIB)
            found = cutoff_layer(waits_s(due, [k] * layers, measured, free_bytes=free_bytes))
            assert found == min(by_time, by_memory, layers), f"{seed=}"


class TestPaperCutoffLayer:
    TICK = 2.0**-10

    @pytest.mark.parametrize(
        ("drafting", "experts", "expected"),
        [
            (20, 999, 10),  # time: 20 / 2
            (21, 999, 10),  # the eleventh layer arrives late
            (20, 7, 3),  # memory: 7 / 2
            (20, 1, 0),
            (0, 999, 0),
            (999, 999, 26),  # never past the last layer
        ],
    )
    def test_it_is_the_tighter_of_time_and_memory(
        self, drafting: float, experts: int, expected: int
    ) -> None:
        due = [(drafting + layer) * self.TICK for layer in range(26)]
        measured = costs(copy_s={8: 8 * self.TICK})
        assert paper_cutoff_layer(due, 2, measured, free_bytes=experts * 16 * MIB) == expected

    def test_a_free_link_is_bounded_by_memory_alone(self) -> None:
        free_link = costs(copy_s={8: 0.0})
        assert paper_cutoff_layer([0.0] * 26, 2, free_link, free_bytes=10 * 16 * MIB) == 5

    def test_ours_is_as_deep_or_deeper_where_predictions_are_right(self) -> None:
        for seed in range(200):
            rng = random.Random(seed)
            layers, k, steps = rng.randint(1, 60), rng.randint(1, 8), rng.randint(0, 8)
            free_bytes = rng.randint(0, layers * k * 16 * MIB * 2)
            measured = costs(draft_s=rng.uniform(0, 0.06), layer_s={1: rng.uniform(0, 0.01)})
            due = deadlines(measured, draft_steps=steps, rows=steps + 1, layer_count=layers)
            paper = paper_cutoff_layer(due, k, measured, free_bytes=free_bytes)
            ours = cutoff_layer(waits_s(due, [k] * layers, measured, free_bytes=free_bytes))
            assert ours >= paper, f"{seed=}"


class TestBreakEven:
    @pytest.mark.parametrize(
        ("prefetch_s", "wait_s", "expected"),
        [
            (0.0, 0.001, 0.0),
            (0.00025, 0.001, 0.25),
            (0.001, 0.001, 1.0),
            (0.003, 0.001, 1.0),
            (0.0, 0.0, 1.0),  # nothing is waited for
        ],
    )
    def test_it_is_what_a_prefetch_takes_of_what_it_saves(
        self, prefetch_s: float, wait_s: float, expected: float
    ) -> None:
        assert break_even(prefetch_s=prefetch_s, wait_s=wait_s) == pytest.approx(expected)


class TestMonotone:
    """More of what helps never waits longer."""

    @pytest.mark.parametrize("seed", range(50))
    def test_waits_move_one_way_with_each_cost(self, seed: int) -> None:
        rng = random.Random(seed)
        layers = rng.randint(1, 30)
        wanted = [rng.choice([0, 1, 2, 3.5, 6]) for _ in range(layers)]
        base: dict[str, Any] = {
            "draft_steps": rng.randint(0, 6),
            "draft_s": rng.uniform(0, 0.02),
            "layer_s": rng.uniform(0, 0.01),
            "copy_s": rng.uniform(0, 0.01),
            "wanted": wanted,
            "free_bytes": rng.randint(0, 2 * 16 * MIB * layers),
            "expert_bytes": rng.randint(1, 32) * MIB,
        }

        def waits(**changed: Any) -> list[float]:
            at = base | changed
            measured = costs(
                draft_s=at["draft_s"],
                layer_s={1: at["layer_s"]},
                copy_s={8: 8 * at["copy_s"]},
                expert_bytes=at["expert_bytes"],
            )
            due = deadlines(measured, draft_steps=at["draft_steps"], rows=4, layer_count=layers)
            assert due == sorted(due)
            budget = byte_budget(due, measured)
            assert budget == sorted(budget)
            found = waits_s(due, at["wanted"], measured, free_bytes=at["free_bytes"])
            assert 1 <= len(found) <= layers + 1
            assert found[cutoff_layer(found)] == pytest.approx(min(found))
            return found

        def hold(sooner: list[float], later: list[float]) -> bool:
            deep = min(len(sooner), len(later))
            return len(sooner) >= len(later) and all(
                a <= b + 1e-12 for a, b in zip(sooner[:deep], later[:deep], strict=True)
            )

        here = waits()
        for name in ("draft_steps", "draft_s", "layer_s", "free_bytes"):
            assert hold(waits(**{name: base[name] * 2}), here), (seed, name)
        for name in ("copy_s", "expert_bytes"):
            assert hold(here, waits(**{name: base[name] * 2})), (seed, name)
        more = list(wanted)
        more[rng.randrange(layers)] += 1
        assert hold(here, waits(wanted=more)), (seed, more)
