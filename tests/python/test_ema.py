"""Moving averages."""

from __future__ import annotations

import pytest

from spmoe.decoding.ema import Ema


def averaged(ema: Ema, *values: float) -> float:
    for value in values:
        ema.add(value)
    return ema.value


def test_a_prior_that_stands_for_no_value_is_replaced() -> None:
    assert averaged(Ema(0.2, 9.0), 4.0) == 4.0


def test_a_prior_weighs_as_many_values_as_it_stands_for() -> None:
    assert averaged(Ema(0.2, 9.0, count=2), 3.0) == pytest.approx(7.0)


def test_the_first_values_weigh_alike() -> None:
    assert averaged(Ema(0.2, 0.0), 9.0, 1.0, 2.0, 3.0, 5.0) == pytest.approx(4.0)


def test_after_them_the_newest_weighs_its_share() -> None:
    expected = 4.0 + 5 * 0.2 * 0.8
    assert averaged(Ema(0.2, 0.0), 4.0, 4.0, 4.0, 4.0, 4.0, 9.0, 4.0) == pytest.approx(expected)
