"""Settings that users write, checked where they enter."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from spmoe.arguments import real_number, shown
from spmoe.errors import InvalidArgument

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "k": 1 << 10,
    "m": 1 << 20,
    "g": 1 << 30,
}


MAX_ROWS = 32  # of a verification; a pass of more tokens is a prompt

_LEAST_LINK_GBPS = 1e-6  # as `Runtime` takes
_MAX_BYTES = (1 << 63) - 1  # of any amount: sizes are 64 bits wide
_ANY_TOTAL_BYTES = 1 << 40  # of a model that is not open yet


def parse_memory(
    text: int | str, total_bytes: int, *, setting: str = "expert_memory", least: int = 1
) -> int:
    """Return the bytes that a memory setting means.

    Args:
        text: "25%" of ``total_bytes``, "6GiB", "500MB", or a number of bytes.
        total_bytes: All experts of the model.
        setting: Its name, for messages.
        least: 0 if there may be none, else 1.

    Raises:
        InvalidArgument: It is none of these, under ``least``, or past 64 bits.
    """
    if least == 0 and str(text).strip() == "0":
        return 0
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%|[a-zA-Z]*)\s*", str(text))
    unit = match[2].lower() if match else None
    if match and unit == "%":
        value = float(match[1]) / 100 * total_bytes
    elif match and unit in _UNITS:
        value = float(match[1]) * _UNITS[unit]
    else:
        value = 0.0
    if not 1 <= value <= _MAX_BYTES:
        none = " 0," if least == 0 else ""
        raise InvalidArgument(
            f'{setting} "{_shown(text)}" is not an amount of memory; give "auto",{none} a share of '
            'the experts such as "25%", a size such as "6GiB", or bytes'
        )
    return int(value)


def check_memory(text: int | str, *, setting: str = "expert_memory", least: int = 1) -> None:
    """Check the syntax of a memory setting, before the model's size is known.

    Arguments as for `parse_memory`.

    Raises:
        InvalidArgument: It is neither "auto" nor what `parse_memory` takes.
    """
    if text != "auto":
        parse_memory(text, _ANY_TOTAL_BYTES, setting=setting, least=least)


def check_link_gbps(link_gbps: float) -> float:
    """Return ``link_gbps``, 10^9 bytes a second, 0 for as fast as it goes.

    Raises:
        InvalidArgument: It is under 1e-6 and not 0, not finite or not a number.
    """
    rate = real_number("link_gbps", link_gbps, 0.0)
    if 0 < rate < _LEAST_LINK_GBPS:
        raise InvalidArgument(
            f"link_gbps is {shown(link_gbps)}; give 0 (as fast as it goes) or at least "
            f"{_LEAST_LINK_GBPS:g}, in 10^9 bytes a second"
        )
    return rate


def _shown(value: object) -> str:
    """Return a setting, short enough for a message."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text)} characters)"


def format_bytes(count: float) -> str:
    """Return a size for people, in binary units: "5.1 MiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_count(count: int, noun: str) -> str:
    """Return a number of things for people: "1 row", "2 rows"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def default_cache() -> Path:
    """Return the user's cache folder for spmoe: ``SPMOE_CACHE``, or as the XDG rules say.

    Raises:
        OSError: The user has no home folder, and neither variable is set.
    """
    if chosen := os.environ.get("SPMOE_CACHE"):
        return Path(os.path.expanduser(chosen))  # noqa: PTH111  leaves an unknown user's "~" as it is
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "spmoe"
    try:
        return Path.home() / ".cache" / "spmoe"
    except RuntimeError as error:
        raise OSError(
            "this user has no home folder to keep a cache in: set SPMOE_CACHE or HOME"
        ) from error


def check_draft_length(draft_length: int | str) -> int | Literal["auto"]:
    """Return ``draft_length``, tokens drafted an iteration, or "auto".

    Raises:
        InvalidArgument: It is neither "auto" nor in [0, 31]: a verification of more than 32
            positions is refused.
    """
    if draft_length == "auto":
        return "auto"
    if not re.fullmatch("[0-9]{1,9}", str(draft_length)) or int(draft_length) >= MAX_ROWS:
        raise InvalidArgument(
            f'draft_length must be "auto" or from 0 (no speculation) to 31, '
            f"got {_shown(draft_length)}"
        )
    return int(draft_length)
