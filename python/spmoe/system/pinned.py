"""How much page-locked memory experts may have."""

from __future__ import annotations

import torch

from spmoe.config import format_bytes, parse_memory
from spmoe.errors import OutOfMemory
from spmoe.system.machine import read_memory

_PINNED_SHARE = 0.8  # of the memory that is available: the system and others need some


def pinned_budget(asked: int | str, total_bytes: int, device: torch.device) -> int:
    """Return how many bytes of experts may be held in page-locked memory.

    Args:
        asked: As `Settings` has it.
        total_bytes: All experts of the model.
        device: That copies from it.

    Raises:
        InvalidArgument: It is no amount of memory.
        OutOfMemory: More is asked than is available now; the message has both numbers.
    """
    if asked == "auto" and device.type == "cpu":
        return 0
    usable = read_memory().usable_bytes
    if asked == "auto":
        return total_bytes if usable is None else min(total_bytes, int(usable * _PINNED_SHARE))
    wanted = min(parse_memory(asked, total_bytes, setting="pinned_memory", least=0), total_bytes)
    if usable is not None and wanted > usable:
        raise OutOfMemory(
            f"pinned_memory of {format_bytes(wanted)} asked, but {format_bytes(usable)} of RAM "
            f'are available; lower it, or give "auto": what fits'
        )
    return wanted
