"""How long work reports its progress."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

log = logging.getLogger("spmoe")

Progress = Callable[[str, int, int], None]  # description, done, total


def silent(_description: str, _done: int, _total: int) -> None:
    """Report nothing."""


@dataclass(slots=True)
class Steps:
    """Work of several steps, each reported as it begins and timed.

    Attributes:
        report: Called with the description of each step, and done of total steps.
        count: Steps in all.
        seconds: Name of a step -> how long it took, of those that have ended.
    """

    report: Progress
    count: int
    seconds: dict[str, float] = field(default_factory=dict)

    def within(self, description: str, done: int, total: int) -> None:
        """Report how far the running step is, without an end of its own."""
        self.report(f"{description}, {done} of {total}", len(self.seconds), self.count)

    @contextmanager
    def step(self, name: str, description: str) -> Iterator[None]:
        """Report a step and time the block."""
        self.report(description, len(self.seconds), self.count)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        log.info("%s: %.2f s", description, self.seconds[name])
