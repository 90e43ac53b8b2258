"""`Counters`: how much a runtime did; differences and sums of it."""

from spmoe._core import Counters

__all__ = ["Counters"]
