"""Turns: requests of several threads, one after another, in the order in which they came."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from spmoe.errors import Error

Item = TypeVar("Item")


@dataclass(slots=True, eq=False)
class _Turn:
    """A place in the queue; ``thread`` is the one that last asked for an item."""

    thread: threading.Thread = field(default_factory=threading.current_thread)


class Turns:
    """A fair lock for generators: one runs at a time, the others wait in order of arrival.

    Thread-safe. A turn begins at the first item of a generator and ends with it: at its last item,
    at an error, when it is closed, or when nobody refers to it any more. Any thread may ask for the
    next item. Waiting threads sleep.
    """

    def __init__(self) -> None:
        # Reentrant: the garbage collector may end a turn while this thread asks for another one.
        self._changed = threading.Condition()
        self._queue: deque[_Turn] = deque()  # the first one runs
        self._open = True
        self._process = os.getpid()

    def hold(self, items: Generator[Item]) -> Generator[Item]:
        """Yield ``items`` in a turn of their own.

        Args:
            items: A generator, not started; it is closed before the turn ends.

        Raises:
            Error: Another turn is held by a generator that this thread reads and has not finished.
                To wait for it would be to wait forever.
        """
        with self._turn() as turn, closing(items):
            for item in items:
                yield item
                turn.thread = threading.current_thread()

    def close(self) -> None:
        """Let every waiting and every later turn begin at once, to find what was closed."""
        with self._changed:
            self._open = False
            self._changed.notify_all()

    @contextmanager
    def _turn(self) -> Iterator[_Turn]:
        turn = _Turn()
        if os.getpid() != self._process:  # a forked child, in which no other thread ends its turn
            yield turn
            return
        with self._changed:
            if self._open and any(other.thread is turn.thread for other in self._queue):
                raise Error(
                    "this thread reads a stream of the engine that is not finished, and one "
                    "request is answered at a time: read that stream to its end or close() it "
                    "before the next request, or load a second engine"
                )
            self._queue.append(turn)
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._queue[0] is turn or not self._open)
            yield turn
        finally:
            with self._changed:
                self._queue.remove(turn)
                self._changed.notify_all()
