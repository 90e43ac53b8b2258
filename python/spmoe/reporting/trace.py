"""Spans of time as a Chrome trace, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

# Track -> row of the picture, top to bottom.
_ROWS = ("draft", "verify", "compute", "wait", "link: demand", "link: prefetch")
_NATIVE = {"demand": "link: demand", "prefetch": "link: prefetch"}


@dataclass(frozen=True, slots=True)
class Phase:
    """A draft step or a verification, in seconds of `time.perf_counter`."""

    track: str  # "draft" or "verify"
    name: str
    start_s: float
    end_s: float


def write_trace(
    path: str | PathLike[str],
    phases: Iterable[Phase],
    spans: Sequence[tuple[str, int, int | None, float, float, int]],
) -> None:
    """Write a Chrome trace.

    Args:
        path: Of the JSON file.
        phases: What the decode loop did.
        spans: From `Runtime.spans`.
    """
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "tid": row, "name": "thread_name", "args": {"name": name}}
        for row, name in enumerate(_ROWS)
    ]
    events += [{"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "spmoe"}}]
    for phase in phases:
        events.append(_event(phase.track, phase.name, phase.start_s, phase.end_s))
    for track, layer, expert, start_s, end_s, depth in spans:
        name = f"layer {layer}" if expert is None else f"L{layer} expert {expert}"
        events.append(_event(_NATIVE.get(track, track), name, start_s, end_s))
        events.append(
            {
                "ph": "C",
                "pid": 1,
                "name": "queue depth",
                "ts": end_s * 1e6,
                "args": {"fills": depth},
            }
        )
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _event(track: str, name: str, start_s: float, end_s: float) -> dict[str, Any]:
    return {
        "ph": "X",
        "pid": 1,
        "tid": _ROWS.index(track),
        "name": name,
        "ts": start_s * 1e6,
        "dur": (end_s - start_s) * 1e6,
    }
