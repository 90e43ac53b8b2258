"""How much page-locked memory experts may have."""

from __future__ import annotations

import torch

from spmoe.config import format_bytes, parse_pinned_memory
from spmoe.errors import OutOfMemory
from spmoe.machine import read_memory

_PINNED_SHARE = 0.8  # of the memory that is available: the system and others need some


def pinned_budget(pinned_memory: int | str, total_bytes: int, device: torch.device) -> int:
    """Return how many bytes of experts may be held in page-locked memory.

    Args:
        pinned_memory: As for `Runtime`.
        total_bytes: All experts of the model.
        device: That copies from it.

    Raises:
        InvalidArgument: It is no amount of memory.
        OutOfMemory: More is asked than is available now; the message has both numbers.
    """
    if pinned_memory == "auto" and device.type == "cpu":
        return 0
    usable = read_memory().usable_bytes
    if pinned_memory != "auto":
        asked = min(parse_pinned_memory(pinned_memory, total_bytes), total_bytes)
        if usable is not None and asked > usable:
            raise OutOfMemory(
                f"pinned_memory of {format_bytes(asked)} asked, but {format_bytes(usable)} of RAM "
                'are available; lower pinned_memory, or give "auto": what fits'
            )
        return asked
    return total_bytes if usable is None else min(total_bytes, int(usable * _PINNED_SHARE))
