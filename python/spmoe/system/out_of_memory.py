"""torch's ways of being out of memory, as spmoe's own error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from spmoe.errors import OutOfMemory

_TORCH_ON_THE_HOST = "can't allocate memory"  # in a RuntimeError of its CPU allocator


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python or torch says that an allocation failed, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _TORCH_ON_THE_HOST in str(error)


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
        if not is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OutOfMemory(f"{what} does not fit in memory ({reason}); {cure}") from error
