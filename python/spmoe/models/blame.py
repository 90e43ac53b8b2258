"""Exceptions of transformers, tokenizers and safetensors, as spmoe's own with a cure."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from spmoe.errors import CheckpointError, Error, OutOfMemory
from spmoe.system.out_of_memory import is_out_of_memory

_REASON_LENGTH = 300  # characters


@contextlib.contextmanager
def blaming(describe: Callable[[str], str]) -> Iterator[None]:
    """Turn an exception that is raised inside into a `CheckpointError`.

    A damaged file ends in whatever the line of transformers raises that first meets it, so there
    is no list of exceptions to expect here. Those of spmoe pass through, and those that are no
    errors, such as KeyboardInterrupt.

    Args:
        describe: Returns the message, from the reason: which file is at fault, and the cure.

    Raises:
        CheckpointError: From the exception.
        OutOfMemory: From one that says that memory ran out.
    """
    try:
        yield
    except Error:
        raise
    except BaseException as error:
        # A panic of tokenizers, which is written in Rust, is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = _reason(error)
        if is_out_of_memory(error):
            raise OutOfMemory(f"memory ran out while a model was loaded ({reason})") from error
        if "Too many open files" in str(error):
            raise CheckpointError(
                f"{describe(reason)}; if the files are whole, raise the limit of open files "
                "(ulimit -n)"
            ) from error
        raise CheckpointError(describe(reason)) from error


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    name = type(error).__name__
    return f"{name}: {' '.join(lines)}"[:_REASON_LENGTH] if lines else name
