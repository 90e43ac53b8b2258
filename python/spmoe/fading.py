"""Means of what changes with time: the newest values weigh most."""

from __future__ import annotations


def blend(old: float, new: float, share: float) -> float:
    """Return a mean of two in which ``new`` weighs ``share``."""
    return old + share * (new - old)


class FadingMean:
    """A mean of values whose older ones fade.

    The plain mean of the first ``1 / newest`` values, so that the first is not taken for the truth.

    Args:
        newest: Weight of each value after those.

    Attributes:
        value: The mean; None of no values.
        count: Values that were added.
    """

    def __init__(self, newest: float) -> None:
        self.newest = newest
        self.value: float | None = None
        self.count = 0

    def add(self, value: float) -> None:
        """Add the newest value."""
        mean = value if self.value is None else self.value
        self.value = blend(mean, value, max(1 / (self.count + 1), self.newest))
        self.count += 1
