"""Where a device's memory goes: weights, caches, scratch, a reserve, and experts for the rest.

Sizes follow from the models' shapes. A prompt is read in one pass wherever the scratch of that pass
fits in the reserve, else in chunks of the most tokens that do: every chunk reads all experts again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spmoe.config import MAX_ROWS, format_bytes, parse_memory
from spmoe.errors import OutOfMemory
from spmoe.models.shapes import ModelShape
from spmoe.system.expert_memory import ExpertSizes, free_bytes, reserve_bytes, slot_bytes

DEFAULT_CONTEXT = 4096  # tokens, where the model's own context is longer
_BLIND_RESERVE_BYTES = 1 << 30  # where a machine does not say what is free


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How the memory of a device is divided. Sizes in bytes.

    Attributes:
        expert_bytes: Of slots for experts.
        total_bytes: All of the target's experts.
        free_bytes: What was free before the models were loaded; None: the machine does not say.
        dense_bytes: The target's weights but the experts'.
        draft_bytes: The draft's weights; 0 without one.
        cache_bytes: Caches of target and draft at ``max_context`` tokens.
        scratch_bytes: Temporaries of a pass over the longest chunk of a prompt of that length.
        reserve_bytes: For what nobody counts.
        max_context: Tokens of prompt and answer that caches and scratch are sized for.
        prompt_chunk: Tokens of a prompt that one pass may read; None: as many as the model can.
    """

    expert_bytes: int
    total_bytes: int
    free_bytes: int | None
    dense_bytes: int
    draft_bytes: int
    cache_bytes: int
    scratch_bytes: int
    reserve_bytes: int
    max_context: int
    prompt_chunk: int | None

    def describe(self) -> str:
        """Return the plan in one line."""
        parts = [f"dense {format_bytes(self.dense_bytes)}"]
        if self.draft_bytes:
            parts.append(f"draft {format_bytes(self.draft_bytes)}")
        parts += [
            f"caches {format_bytes(self.cache_bytes)} at {self.max_context} tokens",
            f"scratch {format_bytes(self.scratch_bytes)}",
            f"reserve {format_bytes(self.reserve_bytes)}",
        ]
        free = "an unknown amount" if self.free_bytes is None else format_bytes(self.free_bytes)
        line = (
            f"expert memory {format_bytes(self.expert_bytes)} of "
            f"{format_bytes(self.total_bytes)}: {free} free, less {', '.join(parts)}"
        )
        if self.prompt_chunk is not None:
            line += f"; prompts in chunks of {self.prompt_chunk} tokens"
        return line


def plan_memory(
    target: nn.Module,
    draft: nn.Module | None,
    store: ExpertSizes,
    *,
    expert_memory: int | str,
    experts_per_token: int,
    device: torch.device,
    free_before: int | None,
    max_context: int | None = None,
) -> MemoryPlan:
    """Divide the memory of a device on which the models' weights are already.

    Args:
        target: Without its experts.
        draft: Perhaps none.
        store: The target's experts.
        expert_memory: As for `load`; what is given is kept to, and the prompt's scratch fitted
            into what is left.
        experts_per_token: The target's top-k.
        device: Where everything is.
        free_before: What was free before the weights were loaded.
        max_context: As for `load`.

    Raises:
        OutOfMemory: Experts are given what fits, and not even those of one token do.
    """
    shapes = [ModelShape.of(model) for model in (target, draft) if model is not None]
    dense, drafted = weight_bytes(target), weight_bytes(draft) if draft is not None else 0
    return divide_memory(
        shapes,
        store,
        expert_memory=expert_memory,
        experts_per_token=experts_per_token,
        dense_bytes=dense,
        draft_bytes=drafted,
        free=_free_before(free_bytes(device), free_before, dense + drafted),
        max_context=max_context,
    )


def divide_memory(
    shapes: list[ModelShape],
    store: ExpertSizes,
    *,
    expert_memory: int | str,
    experts_per_token: int,
    dense_bytes: int,
    draft_bytes: int,
    free: int | None,
    max_context: int | None = None,
) -> MemoryPlan:
    """Divide an amount of memory; looks at no model and at no device.

    Args:
        shapes: Of the target and, if there is one, of the draft.
        store: Sizes of the target's experts.
        expert_memory: As for `plan_memory`.
        experts_per_token: The target's top-k.
        dense_bytes: The target's weights without its experts.
        draft_bytes: The draft's weights; 0 without one.
        free: Bytes that are free before either is loaded; None: unknown.
        max_context: As for `load`.

    Raises:
        OutOfMemory: As for `plan_memory`.
    """
    context = min(max_context or DEFAULT_CONTEXT, shapes[0].context)
    caches = sum(shape.cache_bytes(context) for shape in shapes)
    reserve = _BLIND_RESERVE_BYTES if free is None else reserve_bytes(free)
    left = None if free is None else free - dense_bytes - draft_bytes - caches
    given = None if expert_memory == "auto" else parse_memory(expert_memory, store.total_bytes)
    room = reserve
    if left is not None and given is not None:
        room = min(reserve, left - min(given, store.total_bytes))
    chunk = longest_chunk(shapes, context, room)
    scratch = max(shape.pass_bytes(min(chunk, context), context) for shape in shapes)
    if given is None:
        given = store.total_bytes // 4 if left is None else left - scratch - reserve
    plan = MemoryPlan(
        expert_bytes=min(given, store.total_bytes),
        total_bytes=store.total_bytes,
        free_bytes=free,
        dense_bytes=dense_bytes,
        draft_bytes=draft_bytes,
        cache_bytes=caches,
        scratch_bytes=scratch,
        reserve_bytes=reserve,
        max_context=context,
        prompt_chunk=None if chunk >= shapes[0].context else chunk,
    )
    least = min(slot_bytes(store, experts_per_token), store.total_bytes)
    if expert_memory == "auto" and plan.expert_bytes < least:
        raise OutOfMemory(
            f"no memory is left for the experts of one token, {format_bytes(least)} "
            f"({plan.describe()}); lower max_context, use a smaller draft or none, "
            'dtype="bfloat16", or give expert_memory, which leaves no reserve'
        )
    return plan


def longest_chunk(shapes: list[ModelShape], context: int, room_bytes: int) -> int:
    """Return how many tokens of a prompt a pass may read, so that its scratch fits a room.

    Args:
        shapes: Of all that read the prompt, one after another; the first is the target.
        context: Tokens in the caches when the last chunk is read, at least.
        room_bytes: For the scratch.

    Returns:
        From `MAX_ROWS`, a verification's length, to the target's own context.
    """

    def fits(tokens: int) -> bool:
        return all(shape.pass_bytes(tokens, max(tokens, context)) <= room_bytes for shape in shapes)

    low, high = MAX_ROWS, max(MAX_ROWS, shapes[0].context)
    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights and buffers; those of experts elsewhere count 0."""
    tensors: dict[int, Any] = {
        id(tensor): tensor
        for tensors in (model.parameters(), model.buffers())
        for tensor in tensors
        if tensor.device.type != "meta"
    }
    return sum(tensor.nbytes for tensor in tensors.values())


def _free_before(now: int | None, before: int | None, loaded: int) -> int | None:
    """Return what was free before ``loaded`` bytes were: the less by two accounts.

    Weights that are mapped from a file still count as free memory, and what else was allocated
    meanwhile does not count as loaded.
    """
    accounts = [before] if before is not None else []
    if now is not None:
        accounts.append(now + loaded)
    return min(accounts, default=None)
