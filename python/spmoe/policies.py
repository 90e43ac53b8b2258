"""Names of the policies; importing them does not import torch."""

from __future__ import annotations

from spmoe import _core

POLICIES: tuple[str, ...] = tuple(_core.prefetch_policy_names())  # of prefetching
EVICTIONS: tuple[str, ...] = tuple(_core.eviction_policy_names())
