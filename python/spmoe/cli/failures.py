"""Errors that are no fault of the program, as one line and an exit status."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from spmoe.errors import Error


class Failure(Exception):  # noqa: N818  not an error of its own
    """An error that ends the program with one line.

    Args:
        message: The error and its cure.
        status: Exit status.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def failing_with(status: int) -> Iterator[None]:
    """Translate errors of the user, the model or the machine into a `Failure`.

    Args:
        status: Its exit status.
    """
    try:
        yield
    except BrokenPipeError:  # the reader of the output has seen enough
        raise
    except (Error, OSError, UnicodeError, MemoryError) as error:
        raise Failure(_describe(error), status) from error


def _describe(error: Exception) -> str:
    """Return an error in one line."""
    text = str(error)
    if isinstance(error, Error):
        pass
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, UnicodeEncodeError):
        text = (
            f"standard output cannot hold {error.object[error.start]!r} in {error.encoding}: set "
            "PYTHONIOENCODING=utf-8"
        )
    elif isinstance(error, MemoryError):
        text = f"out of memory {text}".rstrip()
    return " ".join(text.split()) or type(error).__name__
