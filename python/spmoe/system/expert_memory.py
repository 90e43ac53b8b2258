"""How much memory experts get: what is asked, or what fits."""

from __future__ import annotations

from typing import Protocol

import torch

from spmoe.config import format_bytes, parse_memory
from spmoe.errors import OutOfMemory
from spmoe.system.machine import read_memory

_SLOT_BYTES = 256  # a slot is a multiple of it
_RESERVE_BYTES = 1 << 30
_RESERVE_SHARE = 8  # a reserve is no more than this part of what is free: 1 / 8
_BLIND_SHARE = "25%"  # of the experts, where a machine does not say what is free


class ExpertSizes(Protocol):
    """An `ExpertStore`, as far as sizes go."""

    @property
    def layer_count(self) -> int:
        """MoE layers."""
        ...

    @property
    def expert_count(self) -> int:
        """Experts of a layer."""
        ...

    @property
    def blob_bytes(self) -> int:
        """Of one expert."""
        ...

    @property
    def total_bytes(self) -> int:
        """Of all experts."""
        ...


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that is free on a device; None if the machine does not say.

    On the host: what the kernel calls available, within the limits of the control groups.
    """
    if device.type == "cpu":
        return read_memory().usable_bytes
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)


def reserve_bytes(free: int) -> int:
    """Return what is kept of ``free`` bytes for everything that nobody counts."""
    return min(_RESERVE_BYTES, free // _RESERVE_SHARE)


def slot_bytes(store: ExpertSizes, experts: int) -> int:
    """Return the memory that so many resident experts take."""
    return experts * (-(-store.blob_bytes // _SLOT_BYTES) * _SLOT_BYTES)


def expert_budget(
    expert_memory: int | str,
    store: ExpertSizes,
    device: torch.device,
    *,
    experts_per_token: int = 1,
) -> int:
    """Return the bytes of memory for experts: never more than all of them need.

    Args:
        expert_memory: "auto": what is free less a reserve; or as `parse_memory` takes it.
        store: The model's experts.
        device: Where they are to be resident.
        experts_per_token: The model's top-k; "auto" gives these at least, reserve or not.

    Raises:
        InvalidArgument: It is no amount of memory.
        OutOfMemory: More is asked than is free now; the message has both numbers.
    """
    all_experts = slot_bytes(store, store.layer_count * store.expert_count)
    free = free_bytes(device)
    if expert_memory == "auto" and free is not None:
        least = slot_bytes(store, max(1, experts_per_token))
        asked = min(all_experts, max(least, free - reserve_bytes(free)))
    else:
        share = _BLIND_SHARE if expert_memory == "auto" else expert_memory
        asked = parse_memory(share, store.total_bytes)
        if asked >= store.total_bytes:
            asked = all_experts
    if free is not None and asked > free:
        where = "here" if device.type == "cpu" else f"on {device}"
        raise OutOfMemory(
            f"expert_memory of {format_bytes(asked)} asked, but {format_bytes(free)} are "
            f'available {where}; lower expert_memory, or give "auto": what fits'
        )
    return asked
