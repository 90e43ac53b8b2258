"""torch's ways of being out of memory, as spmoe's own error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from spmoe.errors import OutOfMemory

_TORCH_ON_THE_HOST = "can't allocate memory"  # in a RuntimeError of its CPU allocator


@contextmanager
def out_of_memory(what: str, cure: str) -> Iterator[None]:
    """Translate an allocation that fails inside the block.

    Args:
        what: What does not fit: "the draft".
        cure: What to do about it: "use a smaller draft".

    Raises:
        OutOfMemory: An allocation by torch or Python failed.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except (MemoryError, RuntimeError) as error:
        is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not is_memory and _TORCH_ON_THE_HOST not in str(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OutOfMemory(f"{what} does not fit in memory ({reason}); {cure}") from error
