"""Means whose older values fade."""

from __future__ import annotations

import pytest

from spmoe.fading import FadingMean, blend


def test_a_blend_moves_by_the_share_of_the_newest() -> None:
    assert blend(1.0, 3.0, 0.25) == 1.5


def test_of_nothing_there_is_no_mean() -> None:
    assert FadingMean(0.2).value is None


def test_the_first_values_weigh_alike() -> None:
    mean = FadingMean(0.2)
    for value in (9.0, 1.0, 2.0, 3.0, 5.0):
        mean.add(value)
    assert (mean.value, mean.count) == (pytest.approx(4.0), 5)


def test_then_the_newest_weighs_its_share() -> None:
    mean = FadingMean(0.2)
    for value in (4.0,) * 5 + (9.0, 4.0):
        mean.add(value)
    assert mean.value == pytest.approx(4.0 + 5 * 0.2 * 0.8)
