"""The probability that the target accepts a drafted token."""

from __future__ import annotations

import math

import pytest

from spmoe.decoding.acceptance import Acceptance


def test_an_iteration_writes_the_accepted_tokens_and_one_more() -> None:
    for accepted, drafted in ((0, 1), (8, 8), (1, 2)):
        acceptance = Acceptance()
        for _ in range(400):
            acceptance.observe(drafted, accepted, ())
        rate = {0: 0.0, 8: 1.0, 1: 0.5}[accepted]  # of (1, 2): one accepted, one refused
        for length in (0, 1, 4, 31):
            expected = sum(rate**place for place in range(length + 1))
            assert acceptance.tokens(length) == pytest.approx(expected, abs=0.07)


def test_tokens_after_the_first_refusal_are_not_judged() -> None:
    acceptance = Acceptance()
    for _ in range(400):
        acceptance.observe(8, 1, [0.95, 0.55, 0.35])
    assert acceptance.tokens(1) == pytest.approx(1.5, abs=0.02)  # one accepted, one refused
    assert acceptance.of_another([0.95]) > acceptance.of_another([0.35])
    assert acceptance.of_another([0.35]) > acceptance.of_another([0.55])  # that is always refused


class TestAnotherToken:
    @pytest.mark.parametrize("probability", [0.05, 0.35, 0.95])
    def test_it_follows_the_drafts_probability_before_anything_is_known(
        self, probability: float
    ) -> None:
        acceptance = Acceptance()
        alone = acceptance.of_another([])
        assert alone == pytest.approx(0.8)
        assert acceptance.of_another([probability]) == pytest.approx(alone * probability)
        assert acceptance.of_another([probability] * 2) == pytest.approx(alone * probability**2)

    @pytest.mark.parametrize("accepted", [0, 1])
    def test_it_follows_what_became_of_tokens_of_that_probability(self, accepted: int) -> None:
        acceptance = Acceptance()
        for _ in range(400):
            acceptance.observe(1, accepted, [0.75])
        alone = acceptance.of_another([])
        assert acceptance.of_another([0.72]) == pytest.approx(alone * accepted, abs=0.01)
        assert acceptance.of_another([0.65]) == pytest.approx(alone * 0.65)  # another class

    @pytest.mark.parametrize("probability", [math.nan, -1.0, 0.0])
    def test_a_probability_that_is_none_is_the_lowest(self, probability: float) -> None:
        acceptance = Acceptance()
        assert acceptance.of_another([probability]) == acceptance.of_another([0.01])
        acceptance.observe(1, 0, [probability])

    @pytest.mark.parametrize("probability", [1.0, 1.0001])
    def test_a_certain_token_is_of_the_highest_class(self, probability: float) -> None:
        assert Acceptance().of_another([probability]) == Acceptance().of_another([0.95])
