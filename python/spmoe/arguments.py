"""Arguments of the public API, checked where they enter: what was given, and what to give."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Collection
from typing import Any

from spmoe.errors import InvalidArgument


def whole_number(name: str, value: Any, least: int, most: int) -> int:
    """Return ``value`` as an int in [least, most].

    Raises:
        InvalidArgument: It is outside, or not an integer; a bool is none.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not least <= number <= most:
        raise InvalidArgument(f"{name} is {shown(value)}; give an integer from {least} to {most}")
    return number


def real_number(name: str, value: Any, least: float = -math.inf) -> float:
    """Return ``value`` as a finite float of at least ``least``.

    Raises:
        InvalidArgument: It is less, not finite, or not a number; a bool is none.
    """
    try:
        number = math.nan if isinstance(value, (bool, str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and number >= least):
        bound = "" if least == -math.inf else f" of at least {least:g}"
        raise InvalidArgument(f"{name} is {shown(value)}; give a finite number{bound}")
    return number


def choice(name: str, value: Any, choices: Collection[str]) -> str:
    """Return ``value`` if it is one of ``choices``.

    Raises:
        InvalidArgument: It is not.
    """
    if not isinstance(value, str) or value not in choices:
        raise InvalidArgument(f"{name} is {shown(value)}; use one of {', '.join(choices)}")
    return value


def check_model(name: str, value: Any) -> None:
    """Check that ``value`` can name a model: a directory or a hub id.

    Raises:
        InvalidArgument: It is neither text nor a path of text.
    """
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise InvalidArgument(f"{name} is {shown(value)}; give a model's directory or its hub id")


def shown(value: Any) -> str:
    """Return a value and its type for a message, shortened."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
