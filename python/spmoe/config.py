"""Settings that users write, checked where they enter."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

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


def parse_memory(text: int | str, total_bytes: int) -> int:
    """Return the bytes that a memory setting means.

    Args:
        text: "25%" of ``total_bytes``, "6GiB", "500MB", or a number of bytes.
        total_bytes: All experts of the model.

    Raises:
        InvalidArgument: It is none of these, or not positive.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%|[a-zA-Z]*)\s*", str(text))
    unit = match[2].lower() if match else None
    if match and unit == "%":
        value = float(match[1]) / 100 * total_bytes
    elif match and unit in _UNITS:
        value = float(match[1]) * _UNITS[unit]
    else:
        value = 0.0
    if value < 1:
        raise InvalidArgument(
            f'expert_memory "{text}" is not an amount of memory; '
            'give a share of the experts such as "25%", a size such as "6GiB", or bytes'
        )
    return int(value)


def parse_pinned_memory(text: int | str, total_bytes: int) -> int:
    """Return the bytes that a setting of page-locked memory means: 0, or as `parse_memory`.

    Raises:
        InvalidArgument: It is neither.
    """
    if str(text).strip() == "0":
        return 0
    try:
        return parse_memory(text, total_bytes)
    except InvalidArgument:
        raise InvalidArgument(
            f'pinned_memory "{text}" is not an amount of memory; give "auto", 0, a share of the '
            'experts such as "50%", a size such as "32GiB", or bytes'
        ) from None


def format_bytes(count: float) -> str:
    """Return a size for people, in binary units: "5.1 MiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def default_cache() -> Path:
    """Return the user's cache folder for spmoe: ``SPMOE_CACHE``, or as the XDG rules say."""
    if chosen := os.environ.get("SPMOE_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "spmoe"


def check_draft_length(draft_length: int | str) -> int | Literal["auto"]:
    """Return ``draft_length``, tokens drafted an iteration, or "auto".

    Raises:
        InvalidArgument: It is neither "auto" nor in [0, 31]: a verification of more than 32
            positions is refused.
    """
    if draft_length == "auto":
        return "auto"
    if not re.fullmatch("[0-9]+", str(draft_length)) or int(draft_length) > 31:
        raise InvalidArgument(
            f'draft_length must be "auto" or from 0 (no speculation) to 31, got {draft_length}'
        )
    return int(draft_length)
