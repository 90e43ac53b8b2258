"""Faults in the links of the runtimes that a test opens."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from spmoe import _core


@contextmanager
def planted_faults() -> Iterator[_core.FaultPlan]:
    """Give every runtime that is opened meanwhile a link that fails as the yielded plan says."""
    plan = _core.FaultPlan()
    native = _core.Runtime
    _core.Runtime = functools.partial(native, faults=plan)  # type: ignore[assignment, misc]
    try:
        yield plan
    finally:
        _core.Runtime = native  # type: ignore[misc]
