"""What an iteration may prefetch, and what the last ones teach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest

from spmoe.costs import Costs
from spmoe.planner import Planner, Shape

MIB = 1 << 20
COSTS = Costs(
    draft_s=0.020, layer_s={1: 0.005}, copy_s={8: 0.008}, expert_bytes=16 * MIB, prefetch_s=0.0003
)


CHEAP = replace(COSTS, prefetch_s=0.0002)  # a fifth of a copy


@dataclass
class Iteration:
    drafted: int = 4
    accepted: int = 2
    pass_s: Sequence[float] = (0.020,) * 4
    verify_s: float = 0.100
    backlog: int = 0
    probabilities: Sequence[float] = ()

    @property
    def draft_s(self) -> float:
        return sum(self.pass_s)


def planner(
    *, memory_bytes: int = 40 * 16 * MIB, layers: int = 10, policy: str = "sp-moe"
) -> Planner:
    """Ten layers of eight experts, half of them in memory."""
    return Planner(COSTS, Shape(layers, 8, 2, memory_bytes), policy=policy)


def grown(
    fills: float = 0,
    *,
    stall_s: float = 0.0,
    waits: int = 0,
    needs: int = 0,
    recalled: int = 0,
    critical: int | None = None,  # None: those that came true
    needed: float = 61.0,  # of 8 experts five tokens use 6.1, were routing uniform
    repeated: float = 0.0,
) -> SimpleNamespace:
    """Return what a planner reads of `Counters`, in parts of experts where a test wants them."""
    return SimpleNamespace(
        needed=needed,
        repeated=repeated,
        misses=waits // 2,
        late=waits - waits // 2,
        link_bytes=fills * 16 * MIB,
        stall_s=stall_s,
        predicted_needs=needs,
        recalled=recalled,
        critical=recalled if critical is None else critical,
    )


def test_the_budget_grows_by_what_the_link_moves_while_a_layer_runs() -> None:
    budget = planner().limits(4).budget_bytes
    assert budget[0] == pytest.approx(80 * 16 * MIB)  # four draft steps of 20 ms, 1 ms an expert
    assert budget[1] - budget[0] == pytest.approx(5 * 16 * MIB)


def test_without_drafting_the_first_layer_can_await_nothing() -> None:
    limits = planner().limits(0)
    assert limits.budget_bytes[0] == 0
    assert limits.cutoff_layer == 0


def test_the_cutoff_counts_the_fills_that_iterations_really_need() -> None:
    it = planner()
    it.observe(Iteration(), grown(fills=300), read_last=False)  # 30 a layer
    assert it.limits(4).cutoff_layer == 1  # memory: 40 experts
    for _ in range(60):
        it.observe(Iteration(), grown(fills=30), read_last=False)
    assert it.limits(4).cutoff_layer == 10


def test_the_cutoff_learns_from_predictions_that_were_wrong() -> None:
    cutoffs = []
    for recalled, critical in ((100, 100), (50, 200)):
        it = Planner(CHEAP, Shape(10, 8, 2, 1 << 40), policy="sp-moe")
        for _ in range(60):  # 40 fills a layer take longer than the layer
            it.observe(
                Iteration(),
                grown(fills=400, needs=100, recalled=recalled, critical=critical),
                read_last=False,
            )
        cutoffs.append(it.limits(4).cutoff_layer)
    assert cutoffs == [10, 1]


def test_before_any_iteration_fills_are_those_of_uniform_routing() -> None:
    # Of 8 experts 8 (1 - .75^5) = 6.1 are used by five tokens, and half are missing.
    shape = Shape(10, 8, 2, 40 * 16 * MIB)
    assert Planner(CHEAP, shape, policy="sp-moe").limits(4).cutoff_layer == 10
    small = replace(shape, memory_bytes=10 * 16 * MIB)
    assert Planner(CHEAP, small, policy="sp-moe").limits(4).cutoff_layer == 1  # 5.3 a layer


def test_tokens_that_choose_alike_need_less() -> None:
    shape = Shape(10, 8, 2, 40 * 16 * MIB)
    it = Planner(CHEAP, shape, policy="on-demand")
    for _ in range(60):
        it.observe(Iteration(), grown(fills=20, needed=45.0, stall_s=0.02), read_last=False)
    together = it.verify_s(5) - 10 * it.costs.layer_at(5)
    assert together == pytest.approx(0.02, rel=0.02)  # of 45, 20 are filled, in a millisecond each
    more = it.verify_s(9) - it.verify_s(5)
    assert more < 0.02 * (8 * (1 - 0.75**9) / 4.5 - 1)  # and so do longer drafts


def test_plain_decoding_says_what_drafting_would_need() -> None:
    for repeated, distinct in ((5.0, 6.1), (10.0, 3.9), (20.0, 2.0)):
        it = Planner(CHEAP, Shape(10, 8, 2, 40 * 16 * MIB), policy="on-demand")
        alone = Iteration(drafted=0, accepted=0, pass_s=(), verify_s=0.05)
        for _ in range(60):
            it.observe(
                alone,
                grown(fills=10, needed=20.0, repeated=repeated, stall_s=0.01),
                read_last=False,
            )
        # Half of what is needed is filled, in a millisecond each.
        stall_s = it.verify_s(5) - 10 * it.costs.layer_at(5)
        assert stall_s == pytest.approx(10 * distinct / 2 * 0.001, rel=0.02)


def test_it_prefetches_no_deeper_than_pays() -> None:
    never = Planner(
        replace(COSTS, prefetch_s=0.001), Shape(10, 8, 2, 40 * 16 * MIB), policy="sp-moe"
    )
    assert never.limits(4).break_even == 1
    assert never.limits(4).cutoff_layer == 0


def test_it_breaks_even_where_what_a_prefetch_takes_is_what_it_saves() -> None:
    it = Planner(CHEAP, Shape(10, 8, 2, 40 * 16 * MIB), policy="sp-moe")
    assert it.limits(4).break_even == pytest.approx(0.2)
    it.observe(Iteration(), grown(waits=10, stall_s=0.001), read_last=False)
    assert it.limits(4).break_even == pytest.approx(0.2)  # few demands, after prefetches


def test_where_a_prefetch_takes_much_it_is_tried_what_demands_wait_for() -> None:
    it = planner()
    assert it.limits(4).break_even == 1  # the trial
    it.observe(Iteration(), grown(waits=10, stall_s=0.004), read_last=False)
    for _ in range(31):
        assert it.limits(4).break_even == pytest.approx(0.75)  # 0.4 ms each
        it.observe(Iteration(), grown(waits=1, stall_s=0.001), read_last=False)
    assert it.limits(4).break_even == 1  # another
    it.observe(Iteration(), grown(waits=10, stall_s=0.001), read_last=False)
    for _ in range(5):  # nothing is prefetched that is hardly waited for: 0.25 ms
        assert it.limits(4).break_even == 1
        it.observe(Iteration(), grown(waits=10, stall_s=0.001), read_last=False)


def test_one_slow_iteration_does_not_make_prefetches_pay() -> None:
    it = planner()
    for stall_s in [0.001] * 5 + [0.008]:
        it.limits(4)
        it.observe(Iteration(), grown(waits=10, stall_s=stall_s), read_last=False)
    assert it.limits(4).break_even == 1
    for _ in range(3):
        it.limits(4)
        it.observe(Iteration(), grown(waits=10, stall_s=0.008), read_last=False)
    assert it.limits(4).break_even < 1


def test_predictions_are_of_use_where_something_may_be_prefetched() -> None:
    limits = Planner(CHEAP, Shape(10, 8, 2, 10 * 16 * MIB), policy="sp-moe").limits(4)
    assert limits.cutoff_layer == 1
    assert [limits.uses_prediction("sp-moe", layer) for layer in (0, 1)] == [True, False]
    cheap = Planner(CHEAP, Shape(10, 8, 2, 40 * 16 * MIB), policy="sp-moe").limits(4)
    assert cheap.uses_prediction("horizon", 9)
    never = Planner(
        replace(COSTS, prefetch_s=0.001), Shape(10, 8, 2, 40 * 16 * MIB), policy="sp-moe"
    ).limits(4)
    assert never.break_even == 1
    assert not never.uses_prediction("horizon", 0)
    assert never.uses_prediction("next-gate", 0)  # which knows no limits


def test_compute_follows_what_was_measured_without_the_waits() -> None:
    it = planner()
    it.observe(Iteration(verify_s=0.100), grown(stall_s=0.080), read_last=False)
    assert it.costs.layer_at(5) == pytest.approx(0.002)
    it.observe(Iteration(drafted=0, pass_s=(), verify_s=0.010), grown(), read_last=False)
    assert it.costs.layer_at(1) == pytest.approx(0.001)
    assert it.costs.layer_at(3) == pytest.approx(0.0015)


def test_draft_steps_follow_what_was_measured() -> None:
    it = planner()
    for _ in range(60):
        it.observe(Iteration(pass_s=(0.010,) * 4), grown(), read_last=False)
    assert it.costs.draft_s == pytest.approx(0.010, rel=1e-3)
    it.observe(Iteration(pass_s=(5.0, 0.010), backlog=100), grown(), read_last=False)
    assert it.costs.draft_s == pytest.approx(0.010, rel=1e-3)  # reading a prompt is no step


def test_a_prompt_teaches_nothing() -> None:
    it = planner()
    it.observe(Iteration(drafted=32, verify_s=9.0), grown(fills=80), read_last=False)
    assert it.costs == COSTS


class TestVerification:
    def test_before_any_iteration_every_fill_is_waited_for(self) -> None:
        # Five rows use 6.1 of 8 experts, of which half are missing: 30.5 fills of 1 ms in all.
        it = planner(policy="on-demand")
        assert it.verify_s(5) == pytest.approx(10 * 0.005 + 0.0305, rel=1e-3)

    def test_then_it_follows_fills_and_waits_of_late(self) -> None:
        it = planner(policy="on-demand")
        it.observe(Iteration(verify_s=0.070), grown(fills=61, stall_s=0.0305), read_last=False)
        assert it.verify_s(5) == pytest.approx(0.070, rel=1e-3)
        # One row needs 2 of the 6.1, and compute is the same as of five until it is measured.
        plain = it.verify_s(1)
        assert plain == pytest.approx(0.0395 + 0.0305 * 2 / 6.1, rel=1e-3)

    @pytest.mark.parametrize("policy", ["sp-moe", "horizon"])
    def test_what_is_prefetched_meanwhile_is_not_waited_for(self, policy: str) -> None:
        it = Planner(CHEAP, Shape(10, 8, 2, 40 * 16 * MIB), policy=policy)
        # Four draft steps of 20 ms: time for 80 fills, of which 30.5 are needed.
        assert it.verify_s(5) == pytest.approx(10 * 0.005)
        # Nothing is drafted: of 10 fills the first layer's cannot be early. "sp-moe" hears of none
        # but from the draft, and waits for all.
        waits_s = {"sp-moe": 0.010, "horizon": 0.001}[policy]
        assert it.verify_s(1) == pytest.approx(10 * 0.005 + waits_s)

    def test_waits_beyond_the_model_of_the_link_are_added(self) -> None:
        it = Planner(CHEAP, Shape(10, 8, 2, 40 * 16 * MIB), policy="horizon")
        for _ in range(60):
            it.observe(Iteration(verify_s=0.060), grown(fills=30.5, stall_s=0.010), read_last=False)
        assert it.verify_s(5) == pytest.approx(0.060, rel=1e-3)
        assert it.verify_s(1) == pytest.approx(0.060 + 0.001, rel=1e-2)

    def test_the_first_iteration_weighs_no_more_than_those_behind_it(self) -> None:
        it = planner(policy="on-demand")
        for fills in (61, 20, 20):  # the first fills what the prompt evicted
            stalled = grown(fills=fills, stall_s=fills * 0.001)
            it.observe(Iteration(verify_s=0.05 + fills * 0.001), stalled, read_last=False)
        assert it.verify_s(5) == pytest.approx(0.05 + 0.101 / 3, rel=1e-3)

    def test_waits_with_prefetches_say_nothing_of_waits_without(self) -> None:
        it = planner(policy="horizon")
        assert it.limits(4).break_even == 1  # the trial: nothing is prefetched
        it.observe(
            Iteration(verify_s=0.065), grown(fills=30, waits=30, stall_s=0.015), read_last=False
        )
        prefetched = it.verify_s(5)  # nothing is known of such iterations but the model
        assert prefetched == pytest.approx(0.050, rel=1e-3)
        for _ in range(31):
            it.limits(4)
            it.observe(Iteration(verify_s=0.055), grown(fills=30, stall_s=0.005), read_last=False)
        assert it.verify_s(5) == pytest.approx(0.055, rel=1e-3)
        assert it.limits(4).break_even == 1
        it.observe(
            Iteration(verify_s=0.052), grown(fills=30, waits=30, stall_s=0.002), read_last=False
        )
        assert it.limits(4).break_even == 1  # hardly waited for: from here on nothing is prefetched
        # The model says 30; trials waited 15 and 2.
        assert it.verify_s(5) == pytest.approx(0.050 + 0.0085, rel=1e-2)

    def test_plain_iterations_of_sp_moe_say_nothing_of_its_prefetches(self) -> None:
        it = Planner(CHEAP, Shape(10, 8, 2, 40 * 16 * MIB), policy="sp-moe")
        alone = Iteration(drafted=0, accepted=0, pass_s=(), verify_s=0.08)
        for _ in range(3):  # waits 30 ms, where the model says 10
            it.observe(alone, grown(fills=10, needed=20.0, stall_s=0.03), read_last=False)
        assert it.verify_s(1) == pytest.approx(0.080, rel=1e-3)
        assert it.verify_s(5) == pytest.approx(0.050, rel=1e-3)

    def test_other_rows_follow_the_measured_ones_in_proportion(self) -> None:
        it = Planner(
            replace(COSTS, layer_s={1: 0.004, 5: 0.008}),
            Shape(10, 8, 2, 40 * 16 * MIB),
            policy="sp-moe",
        )
        it.observe(Iteration(verify_s=0.160), grown(), read_last=False)
        assert it.costs.layer_at(1) == pytest.approx(0.008)


class TestReadingTheLastToken:
    def test_it_is_not_tried_before_recall_without_it_is_known(self) -> None:
        assert not planner().limits(4).read_last

    def test_it_is_tried_where_all_that_was_missed_costs_more_than_a_step(self) -> None:
        it = planner()
        it.observe(Iteration(), grown(fills=250, needs=100, recalled=90), read_last=False)
        assert it.limits(4).read_last  # a tenth of 250 fills of 1 ms against 20 ms
        assert it.limits(4).budget_bytes[0] == pytest.approx(5 * 20 * 16 * MIB)
        assert not it.limits(0).read_last

    def test_it_is_given_up_where_it_foresees_no_more(self) -> None:
        it = planner()
        it.observe(Iteration(), grown(fills=250, needs=100, recalled=90), read_last=False)
        it.observe(Iteration(), grown(fills=250, needs=100, recalled=91), read_last=True)
        assert not it.limits(4).read_last

    def test_a_fast_link_has_no_use_for_it(self) -> None:
        it = planner()
        it.observe(Iteration(), grown(fills=50, needs=100, recalled=90), read_last=False)
        assert not it.limits(4).read_last


def test_a_draft_step_is_expected_to_take_longer_where_copies_run_beside_it() -> None:
    shape = Shape(10, 8, 2, 40 * 16 * MIB)
    assert Planner(CHEAP, shape, policy="horizon").draft_s == pytest.approx(0.020 * 1.2)
    assert Planner(CHEAP, shape, policy="on-demand").draft_s == pytest.approx(0.020)
    never = replace(COSTS, prefetch_s=0.001)
    assert Planner(never, shape, policy="horizon").draft_s == pytest.approx(0.020)


def test_experts_that_cost_nothing_to_copy_divide_nothing() -> None:
    free = replace(COSTS, copy_s={8: 0.0}, prefetch_s=0.0)
    it = Planner(free, Shape(10, 8, 2, 40 * 16 * MIB), policy="horizon")
    it.observe(Iteration(), grown(fills=10, waits=10, stall_s=0.001), read_last=False)
    assert it.draft_s > 0
