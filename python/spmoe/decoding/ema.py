"""Moving averages of measurements that change with time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Ema:
    """Exponential moving average; of the first ``1 / newest`` values, the plain mean.

    Its ``value`` starts as a prior that stands for ``count`` values.
    """

    newest: float
    value: float
    count: int = 0

    def add(self, value: float) -> None:  # noqa: D102
        self.count += 1
        self.value += max(1 / self.count, self.newest) * (value - self.value)
