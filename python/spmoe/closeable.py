"""Objects that hold threads and memory until they are closed."""

from __future__ import annotations

import atexit
import weakref
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Closeable(ABC):
    """A context manager that closes itself."""

    @abstractmethod
    def close(self) -> None:
        """Give back what is held. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


_to_close: weakref.WeakSet[Closeable] = weakref.WeakSet()


def close_at_exit(closeable: Closeable) -> None:
    """Close an object when the interpreter ends, if it still exists then.

    Daemon threads still run at that time: the next call of each into the object fails like any
    call after `close`, instead of being cut off in native code.
    """
    _to_close.add(closeable)


@atexit.register
def _close_all() -> None:
    for closeable in list(_to_close):
        closeable.close()
