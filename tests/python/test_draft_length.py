"""The choice of the draft length, over iterations that are simulated: no clock is read."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from spmoe.decoding.draft_length import LONGEST, DraftLength
from spmoe.decoding.prior import Choice

ITERATIONS = 450
SEEDS = range(4)
LENGTHS = range(LONGEST + 1)


def plain(lengths: Sequence[int] = LENGTHS) -> list[Choice]:
    return [Choice(length, prefetch=False) for length in lengths]


@dataclass(frozen=True)
class Regime:
    """A machine, a pair and a text.

    Attributes:
        acceptance: Probability that a drafted token is accepted if those before it are.
        draft_s: Of a draft step.
        verify_s: Rows -> seconds of a verification.
        token_s: Of the draft, for each token of a unread.
    """

    acceptance: float
    draft_s: float
    verify_s: Callable[[int], float]
    token_s: float = 0.0

    def seconds(self, length: int) -> float:
        return length * self.draft_s + self.verify_s(length + 1)

    def tokens(self, length: int) -> float:
        return sum(self.acceptance**i for i in range(length + 1))

    def seconds_per_token(self, length: int) -> float:
        return self.seconds(length) / self.tokens(length)

    @property
    def best(self) -> int:
        return min(LENGTHS, key=self.seconds_per_token)


def uncached(experts: int, k: int, *, copy_s: float) -> Callable[[int], float]:
    """A verification that moves every distinct expert of uniform routing."""
    return lambda rows: 0.05 + copy_s * experts * (1 - (1 - k / experts) ** rows)


# Description -> the regime and its best length.
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

    The prior is wrong by ``prior_scale``, and by another seventh or so for each length; its draft
    step is half as long again as the real one. The simulation counts expected tokens, so that luck
    with acceptance is no merit.
    """

    seed: int
    prior_scale: float = 1.0
    unread: int = 0  # of the draft: at first the prompt
    chosen: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.errors = [self.prior_scale * self.noisy(1.0, 0.15) for _ in LENGTHS]
        self.lengths: DraftLength | None = None

    def run(self, regime: Regime, count: int) -> float:
        """Return seconds a token over ``count`` iterations."""

        def prior_s(choice: Choice) -> float:
            draft_s = 1.5 * regime.draft_s * choice.length
            return draft_s + regime.verify_s(choice.length + 1) * self.errors[choice.length]

        if self.lengths is None:
            self.lengths = DraftLength(prior_s)
        seconds = tokens = 0.0
        for number in range(count):
            reading_s = self.unread * regime.token_s
            length = self.lengths.choose(plain(), reading_s=reading_s, left=count - number).length
            self.learn(self.lengths, regime, length)
            self.chosen.append(length)
            seconds += regime.seconds(length) + (reading_s if length else 0.0)
            tokens += regime.tokens(length)
            self.unread = 0 if length else self.unread + 1
        return seconds / tokens

    def learn(self, lengths: DraftLength, regime: Regime, length: int) -> None:
        accepted = 0
        while accepted < length and self.random.random() < regime.acceptance:
            accepted += 1
        steps_s = sum(self.noisy(regime.draft_s) for _ in range(length))
        lengths.observe(
            Choice(length, prefetch=False), steps_s + self.noisy(regime.verify_s(length + 1))
        )
        lengths.acceptance.observe(length, accepted, ())

    def noisy(self, seconds: float, by: float = 0.1) -> float:
        return seconds * math.exp(self.random.gauss(0, by))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class TestRegimes:
    @pytest.mark.parametrize("name", REGIMES)
    def test_it_loses_at_most_a_twentieth_against_the_best_fixed_length(self, name: str) -> None:
        regime, best = REGIMES[name]
        assert regime.best == best
        found = [Simulation(seed).run(regime, ITERATIONS) for seed in SEEDS]
        assert mean(found) <= 1.05 * regime.seconds_per_token(best), found

    @pytest.mark.parametrize("scale", [0.3, 3.0])
    @pytest.mark.parametrize("name", REGIMES)
    def test_a_prior_that_is_wrong_by_a_factor_costs_little(self, name: str, scale: float) -> None:
        regime, best = REGIMES[name]
        found = [Simulation(seed, scale).run(regime, ITERATIONS) for seed in SEEDS]
        assert mean(found) <= 1.08 * regime.seconds_per_token(best), found

    def test_where_the_link_is_expensive_and_the_draft_good_it_settles_on_long_drafts(self) -> None:
        for seed in SEEDS:
            simulation = Simulation(seed)
            simulation.run(REGIMES["expensive link, good draft"][0], ITERATIONS)
            assert mean(simulation.chosen[50:]) > 7, seed

    @pytest.mark.parametrize("name", [name for name in REGIMES if REGIMES[name][1] == 0])
    def test_where_drafting_never_pays_explorations_are_rare(self, name: str) -> None:
        for seed in SEEDS:
            simulation = Simulation(seed)
            simulation.run(REGIMES[name][0], ITERATIONS)
            assert simulation.chosen[50:].count(0) > 0.9 * (ITERATIONS - 50), seed

    def test_the_same_measurements_lead_to_the_same_choices(self) -> None:
        chosen = []
        for _ in range(2):
            simulation = Simulation(7)
            simulation.run(REGIMES["a few tokens pay"][0], 100)
            chosen.append(simulation.chosen)
        assert chosen[0] == chosen[1]


class TestChange:
    """A text may turn from what the draft knows to what it does not, and back."""

    GOOD = Regime(0.9, 0.02, lambda rows: 0.3 + 0.05 * rows)
    BAD = Regime(0.05, 0.02, lambda rows: 0.3 + 0.05 * rows)
    SLOW = Regime(0.9, 0.02, lambda rows: 0.3 * rows)  # another program uses the machine

    @pytest.mark.parametrize(("before", "after"), [(GOOD, BAD), (BAD, GOOD)])
    def test_it_follows_a_change_of_acceptance(self, before: Regime, after: Regime) -> None:
        assert self.settled(before, after, within=100) <= 1.1

    @pytest.mark.parametrize(("before", "after"), [(GOOD, SLOW), (SLOW, GOOD)])
    def test_it_follows_a_change_of_costs(self, before: Regime, after: Regime) -> None:
        assert self.settled(before, after, within=200) <= 1.1

    @staticmethod
    def settled(before: Regime, after: Regime, *, within: int) -> float:
        """Return the time a token some iterations after a change, over the least possible."""
        found = []
        for seed in SEEDS:
            simulation = Simulation(seed)
            simulation.run(before, 300)
            simulation.run(after, within)
            found.append(simulation.run(after, 200))
        return mean(found) / after.seconds_per_token(after.best)


class TestUnreadTokens:
    """The time to read what the draft has not read is part of the price."""

    PAYS = Regime(0.9, 0.02, lambda rows: 0.3 + 0.05 * rows, token_s=0.02)
    FAST = Regime(0.8, 0.05, lambda rows: 0.02 + 0.02 * rows, token_s=0.02)

    def test_a_prompt_that_costs_more_than_drafts_can_save_is_left_unread(self) -> None:
        def first(left: int) -> int:
            lengths = DraftLength(lambda choice: self.PAYS.seconds(choice.length))
            return lengths.choose(plain(), reading_s=20.0, left=left).length

        assert first(10) == 0
        assert first(10_000) > 0

    def test_an_exploration_that_has_to_read_a_long_prompt_waits(self) -> None:
        assert self.FAST.best == 0
        for seed in SEEDS:
            simulation = Simulation(seed, unread=200)  # four seconds to read
            simulation.run(self.FAST, 128)
            assert set(simulation.chosen) == {0}, seed

    def test_where_drafts_pay_they_begin_at_once(self) -> None:
        for seed in SEEDS:
            simulation = Simulation(seed, unread=50)
            simulation.run(self.PAYS, 100)
            assert simulation.chosen[0] > 0, seed


class TestExploration:
    def test_it_begins_with_what_the_prior_says_is_best(self) -> None:
        for name, (regime, _) in REGIMES.items():

            def prior_s(choice: Choice, regime: Regime = regime) -> float:
                return regime.seconds(choice.length)

            # The acceptance before any token is judged is .8, whatever the text's.
            expected = Regime(0.8, regime.draft_s, regime.verify_s).best
            assert DraftLength(prior_s).choose(plain()).length == expected, name

    def test_measurements_outweigh_the_prior(self) -> None:
        lengths = DraftLength(lambda choice: 0.1 + 0.15 * choice.length)
        none, one = plain((0, 1))
        assert lengths.seconds_per_token(none) < lengths.seconds_per_token(one)
        for _ in range(60):
            lengths.observe(one, 0.011)
            lengths.observe(none, 0.1)
        assert lengths.seconds(one) == pytest.approx(0.011, rel=0.01)
        assert lengths.seconds(none) == pytest.approx(0.1, rel=0.01)

    def test_most_lengths_are_tried_where_it_hardly_matters(self) -> None:
        simulation = Simulation(0)
        simulation.run(Regime(0.8, 0.0, lambda rows: 0.1 * (1 - 0.8**rows) / 0.2), ITERATIONS)
        assert len(set(simulation.chosen)) >= 6

    def test_explorations_lose_a_fiftieth_of_the_time_at_most(self) -> None:
        lengths = DraftLength(lambda choice: 1.0 + choice.length)  # as it turns out to be
        for _ in range(400):
            lengths.acceptance.observe(1, 0, ())  # no drafted token is accepted
        lost_s = 0.0
        for number in range(1, 500):
            choice = lengths.choose(plain())
            lost_s += choice.length
            lengths.observe(choice, 1.0 + choice.length)
            assert lost_s <= 0.02 * (number + lost_s) + 0.001, number
        assert lost_s > 0.01 * 500

    def test_one_choice_is_never_left(self) -> None:
        lengths = DraftLength(lambda choice: 1.0)
        for _ in range(200):
            assert lengths.choose(plain((4,))) == (4, False)
            lengths.observe(Choice(4, prefetch=False), 1.0)


class TestPrefetching:
    BOTH = (Choice(4, prefetch=True), Choice(4, prefetch=False))

    @pytest.mark.parametrize("pays", [True, False])
    def test_it_is_measured_whether_prefetching_pays(self, pays: bool) -> None:
        lengths = DraftLength(lambda choice: 1.0 if choice.prefetch else 1.1)
        chosen = []
        for _ in range(400):
            choice = lengths.choose(self.BOTH)
            chosen.append(choice.prefetch)
            lengths.observe(choice, 1.0 if choice.prefetch == pays else 1.4)
        assert chosen[0]  # as the prior says
        assert chosen[200:].count(pays) > 0.9 * 200


class TestWorthAnother:
    def test_it_is_while_the_time_it_may_save_exceeds_a_step_and_a_row(self) -> None:
        # A step and a row take 0.06; a token 0.31 + 0.06 g seconds over A(g).
        regime = Regime(0.9, 0.05, lambda rows: 0.25 + 0.01 * rows)
        lengths = DraftLength(lambda choice: regime.seconds(choice.length))
        best = lengths.choose(plain())
        token_s = lengths.seconds_per_token(best)
        classes = [place / 10 + 0.05 for place in range(10)]
        worth = [probability for probability in classes if lengths.worth_another([probability])]
        expected = [p for p in classes if 0.8 * p * token_s > 0.06]
        assert worth == expected
        assert 0 < len(worth) < 10

    def test_a_draft_that_is_surer_than_it_says_is_asked_for_more(self) -> None:
        regime = Regime(0.9, 0.05, lambda rows: 0.3 + 0.01 * rows)
        lengths = DraftLength(lambda choice: regime.seconds(choice.length))
        lengths.choose(plain())
        assert not lengths.worth_another([0.35])
        for _ in range(20):
            lengths.acceptance.observe(1, 1, [0.35])
        assert lengths.worth_another([0.35])
        assert not lengths.worth_another([0.15])  # of which nothing is known

    def test_a_step_that_costs_more_than_a_token_never_is(self) -> None:
        simulation = Simulation(0)
        simulation.run(REGIMES["draft as slow as the target"][0], 20)
        assert simulation.lengths is not None
        assert not simulation.lengths.worth_another([1.0])


def test_an_iteration_that_is_expected_to_take_no_time_divides_nothing() -> None:
    lengths = DraftLength(lambda choice: 0.0)
    for _ in range(5):
        lengths.observe(lengths.choose(plain()), 0.1)
    assert lengths.seconds_per_token(lengths.choose(plain())) > 0
