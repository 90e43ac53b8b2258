"""Objects that hold threads and memory until they are closed."""

from __future__ import annotations

import atexit
import os
import threading
import traceback
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from types import TracebackType
from typing import Self, TypeVar

Item = TypeVar("Item")

_EXIT_WAIT_S = 10.0  # for what daemon threads are at; a closed runtime ends a pass within a layer


class Closeable(ABC):
    """A context manager that closes itself."""

    @abstractmethod
    def close(self) -> None:
        """Give back what is held. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_to_close: weakref.WeakSet[Closeable] = weakref.WeakSet()


def close_at_exit(closeable: Closeable) -> None:
    """Close an object when the interpreter ends, if it still exists then.

    Daemon threads still run at that time: the next call of each into the object fails like any
    call after `close`, instead of being cut off in native code.
    """
    _to_close.add(closeable)


class _Work:
    """Counts what threads are making now."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start from 0 again: in a forked child, which has none of these threads."""
        self.count = 0
        self.ending = False
        self.changed = threading.Condition()

    def __enter__(self) -> None:
        with self.changed:
            self.count += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.ending and trace is not None:
            # torch gives the GIL up to free a tensor that a failed frame still holds.
            traceback.clear_frames(trace)
        with self.changed:
            self.count -= 1
            self.changed.notify_all()

    def wait(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.count == 0, timeout=_EXIT_WAIT_S)


working = _Work()  # `with working:` lets the end of the interpreter wait for what is made inside
os.register_at_fork(after_in_child=working.forget)


def at_work(items: Iterator[Item]) -> Iterator[Item]:
    """Yield ``items``; the end of the interpreter waits while one of them is being made.

    A daemon thread that is in an operation of torch when the interpreter ends would abort the
    process as it comes back. Once everything is closed, whatever it is making fails soon.
    """
    while True:
        with working:
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


@atexit.register
def _close_all() -> None:
    working.ending = True
    for closeable in list(_to_close):
        closeable.close()
    working.wait()
