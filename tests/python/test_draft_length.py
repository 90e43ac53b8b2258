"""The choice of the draft length, over iterations that are simulated: no clock is read."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from spmoe.confidence import Confidence
from spmoe.draft_length import DraftLength, tokens_per_iteration
from spmoe.fading import FadingMean

LONGEST = 8
ITERATIONS = 450
SEEDS = range(4)


@dataclass(frozen=True)
class Sample:
    """What a simulated iteration came to."""

    drafted: int
    accepted: int
    pass_s: Sequence[float]
    verify_s: float
    backlog: int = 0
    probabilities: Sequence[float] = ()
    beyond_s: float = 0.0  # of drafting, beyond its passes

    @property
    def draft_s(self) -> float:
        return math.fsum(self.pass_s) + self.beyond_s


@dataclass(frozen=True)
class Regime:
    """A machine, a pair and a text.

    Attributes:
        acceptance: Probability that a drafted token is accepted if those before it are.
        draft_s: Of a draft step.
        verify_s: Rows -> seconds of a verification.
        token_s: Of the draft, for each token of a backlog.
    """

    acceptance: float
    draft_s: float
    verify_s: Callable[[int], float]
    token_s: float = 0.0

    def seconds(self, length: int, backlog: int = 0) -> float:
        reading_s = backlog * self.token_s if length else 0.0
        return reading_s + length * self.draft_s + self.verify_s(length + 1)

    def tokens(self, length: int) -> float:
        return sum(self.acceptance**i for i in range(length + 1))

    def seconds_per_token(self, length: int) -> float:
        return self.seconds(length) / self.tokens(length)

    @property
    def best(self) -> int:
        return min(range(LONGEST + 1), key=self.seconds_per_token)


def uncached(experts: int, k: int, *, copy_s: float) -> Callable[[int], float]:
    """A verification that moves every distinct expert of uniform routing: facts, section 7."""
    return lambda rows: 0.05 + copy_s * experts * (1 - (1 - k / experts) ** rows)


# What it is -> the regime and its best length.
REGIMES: dict[str, tuple[Regime, int]] = {
    "expensive link, good draft": (Regime(0.9, 0.01, lambda rows: 1 + 0.02 * rows), 8),
    "expensive link, poor draft": (Regime(0.5, 0.01, lambda rows: 1 + 0.02 * rows), 4),
    "perfect draft": (Regime(1.0, 0.02, lambda rows: 0.3 + 0.05 * rows), 8),
    "a few tokens pay": (Regime(0.6, 0.05, lambda rows: 0.5 + 0.1 * rows), 2),
    "one token pays": (Regime(0.5, 0.1, lambda rows: 0.5 + 0.1 * rows), 1),
    "rows in tiles of four": (Regime(0.7, 0.01, lambda rows: 0.2 * (1 + (rows - 1) // 4)), 3),
    "few large experts": (Regime(0.85, 0.02, uncached(8, 2, copy_s=0.1)), 8),
    "many small experts": (Regime(0.95, 0.02, uncached(64, 6, copy_s=0.02)), 8),
    "draft as slow as the target": (Regime(0.8, 0.3, lambda rows: 0.1 + 0.01 * rows), 0),
    "every row costs a pass": (Regime(0.3, 0.1, lambda rows: 0.1 * rows), 0),
    "nothing is accepted": (Regime(0.02, 0.02, lambda rows: 0.1 + 0.03 * rows), 0),
    "several rows flood the cache": (
        Regime(0.8, 0.02, lambda rows: 0.1 if rows == 1 else 0.5 + 0.05 * rows),
        0,
    ),
}


@dataclass
class Simulation:
    """Iterations of a `DraftLength` in a regime; times vary by a tenth.

    What verifications are expected to cost is wrong by a seventh or so, each length by another.
    What it lost is counted in expected tokens, so that luck with acceptance is no merit.
    """

    seed: int
    settings: dict[str, Any] = field(default_factory=dict)  # of the `DraftLength`
    backlog: int = 0  # of the draft: at first the prompt
    chosen: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.lengths: DraftLength | None = None

    def run(self, regime: Regime, count: int) -> float:
        """Return seconds a token over ``count`` iterations."""
        seconds = tokens = 0.0
        if self.lengths is None:
            errors = [math.exp(self.random.gauss(0, 0.15)) for _ in range(LONGEST + 2)]
            self.lengths = DraftLength(
                lambda rows: regime.verify_s(rows) * errors[rows],
                regime.draft_s * 1.5,
                regime.token_s * 1.5,
                **{"longest": LONGEST} | self.settings,
            )
        for number in range(count):
            length = self.lengths.choose(self.backlog, count - number)
            assert 0 <= length <= self.lengths.longest
            iteration = self.iteration(regime, length)
            self.lengths.observe(iteration)
            self.chosen.append(length)
            seconds += regime.seconds(length, self.backlog)
            tokens += regime.tokens(length)
            self.backlog = 0 if length else self.backlog + 1
        return seconds / tokens

    def iteration(self, regime: Regime, length: int) -> Sample:
        accepted = 0
        while accepted < length and self.random.random() < regime.acceptance:
            accepted += 1
        return Sample(
            drafted=length,
            accepted=accepted,
            pass_s=[
                self.noisy(regime.draft_s) + (0 if number else self.backlog * regime.token_s)
                for number in range(length)
            ],
            verify_s=self.noisy(regime.verify_s(length + 1)),
            backlog=self.backlog,
        )

    def noisy(self, seconds: float) -> float:
        return seconds * math.exp(self.random.gauss(0, 0.1))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class TestRegimes:
    @pytest.mark.parametrize("name", REGIMES)
    def test_it_loses_at_most_a_twentieth_against_the_best_fixed_length(self, name: str) -> None:
        regime, best = REGIMES[name]
        assert regime.best == best
        found = [Simulation(seed).run(regime, ITERATIONS) for seed in SEEDS]
        assert mean(found) <= 1.05 * regime.seconds_per_token(best), found

    def test_where_the_link_is_expensive_and_the_draft_good_it_settles_on_long_drafts(self) -> None:
        for seed in SEEDS:
            simulation = Simulation(seed)
            simulation.run(REGIMES["expensive link, good draft"][0], ITERATIONS)
            assert mean(simulation.chosen[50:]) > 7, seed

    @pytest.mark.parametrize("name", [name for name in REGIMES if REGIMES[name][1] == 0])
    def test_where_drafting_never_pays_its_tests_are_rare(self, name: str) -> None:
        for seed in SEEDS:
            simulation = Simulation(seed)
            simulation.run(REGIMES[name][0], ITERATIONS)
            assert simulation.chosen[50:].count(0) > 0.9 * (ITERATIONS - 50), seed


class TestChange:
    """A text may turn from what the draft knows to what it does not, and back."""

    GOOD = Regime(0.9, 0.02, lambda rows: 0.3 + 0.05 * rows)
    BAD = Regime(0.05, 0.02, lambda rows: 0.3 + 0.05 * rows)

    @pytest.mark.parametrize(("before", "after"), [(GOOD, BAD), (BAD, GOOD)])
    def test_it_follows_a_change_of_acceptance(self, before: Regime, after: Regime) -> None:
        for seed in SEEDS:
            simulation = Simulation(seed)
            simulation.run(before, 300)
            simulation.run(after, 100)
            settled = simulation.run(after, 200)
            assert settled <= 1.1 * after.seconds_per_token(after.best), seed


class TestBacklog:
    """What the draft has to read before it can draft is part of the price."""

    PAYS = Regime(0.9, 0.02, lambda rows: 0.3 + 0.05 * rows, token_s=0.02)
    FAST = Regime(0.8, 0.05, lambda rows: 0.02 + 0.02 * rows, token_s=0.02)

    def test_a_prompt_that_costs_more_than_drafts_can_save_is_left_unread(self) -> None:
        few, many = DraftLength(*self.settings(self.PAYS)), DraftLength(*self.settings(self.PAYS))
        assert few.choose(backlog=1000, left=10) == 0
        assert many.choose(backlog=1000, left=10_000) > 0

    def test_tests_that_cannot_be_afforded_are_not_made(self) -> None:
        assert self.FAST.best == 0
        for seed in SEEDS:
            simulation = Simulation(seed, backlog=200)  # four seconds to read
            seconds = simulation.run(self.FAST, 128)
            assert seconds == pytest.approx(self.FAST.seconds_per_token(0)), seed

    def test_where_drafts_pay_they_begin_at_once(self) -> None:
        for seed in SEEDS:
            simulation = Simulation(seed, backlog=50)
            simulation.run(self.PAYS, 100)
            assert simulation.chosen[0] > 0, seed

    def test_a_backlog_is_no_draft_step(self) -> None:
        lengths = DraftLength(lambda rows: 0.1, draft_s=0.01)
        for _ in range(30):
            lengths.observe(Sample(2, 2, [2.01, 0.01], verify_s=0.1, backlog=100))
        assert lengths.draft_s == pytest.approx(0.01)
        assert lengths.token_s == pytest.approx(0.02, rel=0.01)

    def test_a_first_step_that_takes_longer_counts_once(self) -> None:
        lengths = DraftLength(lambda rows: 0.1, draft_s=0.01)
        for _ in range(60):
            lengths.observe(Sample(2, 2, [0.03, 0.01], verify_s=0.1))
        long, longer = (
            lengths.seconds_per_token(g) * tokens_per_iteration(lengths.acceptance, g)
            for g in (4, 5)
        )
        assert long == pytest.approx(0.1 + 0.06, rel=0.01)
        assert longer - long == pytest.approx(0.01, rel=0.05)

    def test_a_first_step_that_is_the_fastest_counts_as_one(self) -> None:
        lengths = DraftLength(lambda rows: 0.1, draft_s=0.03)
        for _ in range(60):
            lengths.observe(Sample(2, 2, [0.01, 0.03], verify_s=0.1))
        seconds = lengths.seconds_per_token(4) * tokens_per_iteration(lengths.acceptance, 4)
        assert seconds == pytest.approx(0.1 + 4 * 0.03, rel=0.01)  # a lead is no gift

    def test_one_step_at_a_time_tells_what_steps_take(self) -> None:
        lengths = DraftLength(lambda rows: 0.1, draft_s=0.01)
        for _ in range(200):
            lengths.observe(Sample(1, 1, [0.04], verify_s=0.1, beyond_s=0.02))
        assert 0.02 < lengths.draft_s < 0.05  # what is the step's and what is not, nobody can tell
        seconds = lengths.seconds_per_token(1) * tokens_per_iteration(lengths.acceptance, 1)
        assert seconds == pytest.approx(0.1 + 0.06, rel=0.01)

    def test_what_drafting_takes_beyond_its_steps_counts_once(self) -> None:
        lengths = DraftLength(lambda rows: 0.1, draft_s=0.01)
        for _ in range(60):  # its last token is read too, to predict experts for it
            lengths.observe(Sample(3, 3, [0.01] * 3, verify_s=0.1, beyond_s=0.02))
        assert lengths.draft_s == pytest.approx(0.01)
        seconds = lengths.seconds_per_token(5) * tokens_per_iteration(lengths.acceptance, 5)
        assert seconds == pytest.approx(0.1 + 0.05 + 0.02, rel=0.01)

    @staticmethod
    def settings(regime: Regime) -> tuple[Callable[[int], float], float, float]:
        return regime.verify_s, regime.draft_s, regime.token_s


class TestTestsOfOtherLengths:
    def test_it_begins_with_what_is_expected_to_be_best(self) -> None:
        for name, (regime, best) in REGIMES.items():
            lengths = DraftLength(regime.verify_s, regime.draft_s, longest=LONGEST)
            # At the acceptance that it starts with, .8, whatever the text's.
            expected = Regime(0.8, regime.draft_s, regime.verify_s).best
            assert lengths.choose() == expected, (name, best)

    def test_what_was_measured_often_outweighs_what_was_expected(self) -> None:
        lengths = DraftLength(lambda rows: 0.1 * rows, 0.05, longest=1)
        assert lengths.choose() == 0
        for _ in range(200):
            lengths.observe(Sample(1, 1, [0.001], verify_s=0.01))
            lengths.observe(Sample(0, 0, [], verify_s=0.1))
        assert lengths.seconds_per_token(1) < lengths.seconds_per_token(0)

    @pytest.mark.parametrize("longest", range(4))
    def test_no_length_is_beyond_the_longest(self, longest: int) -> None:
        simulation = Simulation(0, {"longest": longest})
        simulation.run(REGIMES["perfect draft"][0], 60)
        assert max(simulation.chosen) == longest

    def test_every_length_is_tried_where_it_hardly_matters(self) -> None:
        simulation = Simulation(0)
        simulation.run(Regime(0.8, 0.0, lambda rows: 0.1 * (1 - 0.8**rows) / 0.2), ITERATIONS)
        assert set(simulation.chosen) == set(range(LONGEST + 1))

    def test_a_share_of_nothing_allows_no_tests(self) -> None:
        simulation = Simulation(0, {"test_share": 0.0})
        simulation.run(REGIMES["every row costs a pass"][0], 100)
        assert set(simulation.chosen[20:]) == {0}


@pytest.mark.parametrize("length", [0, 1, 4, 31])
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.974, 0.999])
def test_tokens_of_an_iteration_are_the_closed_form(acceptance: float, length: int) -> None:
    closed = (1 - acceptance ** (length + 1)) / (1 - acceptance)
    assert tokens_per_iteration(acceptance, length) == pytest.approx(closed, rel=1e-12)


@pytest.mark.parametrize("length", [0, 3, 31])
def test_a_perfect_draft_writes_all_it_drafts_and_one_more(length: int) -> None:
    assert tokens_per_iteration(1.0, length) == length + 1


class TestWorthAnother:
    def test_it_is_while_the_time_it_may_save_exceeds_a_step_and_a_row(self) -> None:
        # Draft step 0.05 and row 0.01; the best length costs 0.72 seconds / 5.2 tokens or so.
        regime = Regime(0.9, 0.05, lambda rows: 0.3 + 0.01 * rows)
        lengths = DraftLength(regime.verify_s, regime.draft_s)
        for length in (4, 0, 8, 2) * 30:
            accepted = length if length != 8 else 4
            passes = [regime.draft_s] * length
            lengths.observe(Sample(length, accepted, passes, regime.verify_s(length + 1)))
        best = min(lengths.seconds_per_token(length) for length in range(LONGEST + 1))
        edge = 0.06 / best / lengths.acceptance  # it has to be accepted itself
        assert 0 < edge < 1
        assert lengths.worth_another([edge * 1.01])
        assert not lengths.worth_another([edge * 0.99])

    def test_a_draft_that_is_surer_than_it_says_is_asked_for_more(self) -> None:
        regime = Regime(0.9, 0.05, lambda rows: 0.3 + 0.01 * rows)
        lengths = DraftLength(regime.verify_s, regime.draft_s)
        assert not lengths.worth_another([0.35])
        for _ in range(20):
            lengths.observe(Sample(1, 1, [0.05], 0.32, probabilities=[0.35]))
        assert lengths.worth_another([0.35])
        assert not lengths.worth_another([0.15])  # of which nothing is known

    def test_a_step_that_costs_more_than_a_token_never_is(self) -> None:
        simulation = Simulation(0)
        simulation.run(REGIMES["draft as slow as the target"][0], 20)
        assert simulation.lengths is not None
        assert not simulation.lengths.worth_another([1.0])


def test_tokens_behind_the_first_refusal_say_nothing_about_acceptance() -> None:
    lengths = DraftLength(lambda rows: 0.1, 0.01)
    for _ in range(200):
        lengths.observe(Sample(drafted=8, accepted=1, pass_s=[0.01] * 8, verify_s=0.1))
    assert lengths.acceptance == pytest.approx(0.5, abs=0.01)  # one accepted, one refused


def test_a_thread_that_meets_a_mean_of_nothing_takes_what_is_expected() -> None:
    lengths = DraftLength(lambda rows: 0.1 * rows, 0.05)
    lengths._verify_s[1] = FadingMean(0.1)  # as another thread leaves it for a moment
    assert lengths.seconds_per_token(0) == pytest.approx(0.1)


class TestConfidence:
    def test_the_draft_is_believed_before_anything_is_known(self) -> None:
        assert Confidence().acceptance(0.3) == pytest.approx(0.3)
        assert Confidence().acceptance(1.0) == 1.0

    @pytest.mark.parametrize("acceptance", [0.0, 0.5, 1.0])
    def test_then_what_came_of_such_tokens_counts(self, acceptance: float) -> None:
        confidence = Confidence()
        for number in range(400):
            confidence.observe([0.75], number % 2 if acceptance == 0.5 else int(acceptance))
        assert confidence.acceptance(0.72) == pytest.approx(acceptance, abs=0.04)
        assert confidence.acceptance(0.65) == pytest.approx(0.65)  # another class

    def test_what_comes_behind_a_refusal_is_not_judged(self) -> None:
        confidence = Confidence()
        confidence.observe([0.95, 0.55, 0.35], accepted=1)
        assert confidence.acceptance(0.95) > 0.95
        assert confidence.acceptance(0.55) < 0.55
        assert confidence.acceptance(0.35) == pytest.approx(0.35)

    def test_what_is_not_a_number_is_no_reason_to_go_on(self) -> None:
        lengths = DraftLength(lambda rows: 1.0, 0.001)
        assert lengths.worth_another([0.9])
        assert not lengths.worth_another([math.nan])
        lengths.observe(Sample(1, 0, [0.001], 1.0, probabilities=[math.nan]))
