"""The figures of one request, in the words and units of the reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from spmoe.reporting.counters import Counters
from spmoe.system.machine import peak_rss_bytes


@dataclass(slots=True)
class Course:
    """How far one request is. Seconds count from the beginning of its turn.

    `finish_reason` is "stop" (end-of-text token or stop string) or "length".
    """

    prompt_tokens: int
    new_tokens: int = 0
    iterations: int = 0
    drafted: int = 0
    accepted: int = 0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    finish_reason: str = "length"


@dataclass(frozen=True, slots=True)
class Metrics:
    """One request's figures. Bytes and seconds; ratios are None where nothing was counted.

    `ttft_s` is the time to the first token, `tpot_s` the time for each token after it.
    `acceptance` is accepted of drafted tokens. `hit_rate` is hits of all experts needed.
    `link_busy_s` is time during which any copy waited or was in flight; `link_gbps` is what was
    moved over that time, 10^9 bytes a second.
    `pinned_bytes` of experts are in page-locked memory, which was filled at `pinned_gbps`.
    Prefetch bytes used can exceed those moved in a request, if an earlier one moved them.
    """

    prompt_tokens: int
    new_tokens: int
    finish_reason: str
    ttft_s: float
    tpot_s: float | None
    tokens_per_s: float
    iterations: int
    drafted: int
    accepted: int
    acceptance: float | None
    tokens_per_iteration: float
    hits: int
    late: int
    misses: int
    hit_rate: float | None
    demand_bytes: int
    prefetch_used_bytes: int
    prefetch_wasted_bytes: int
    bytes_per_token: float
    stall_s: float
    compute_s: float
    link_busy_s: float
    link_gbps: float | None
    expert_memory_bytes: int
    expert_total_bytes: int
    pinned_bytes: int
    pinned_gbps: float | None
    device: str
    peak_rss_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Return all figures by name."""
        return asdict(self)


def summarise(
    course: Course,
    used: Counters,
    stats: Mapping[str, Any],
    *,
    expert_memory_bytes: int,
    expert_total_bytes: int,
) -> Metrics:
    """Return one request's figures.

    Args:
        course: Of the request.
        used: How much the runtime's counters grew in it.
        stats: Of the runtime, at the end of it: what is page-locked, and the device.
        expert_memory_bytes: Of the runtime.
        expert_total_bytes: Of all experts.
    """
    new_tokens = course.new_tokens
    decode_s = course.last_token_s - course.first_token_s
    pinned_bytes = stats["pinned_bytes"]
    return Metrics(
        prompt_tokens=course.prompt_tokens,
        new_tokens=new_tokens,
        finish_reason=course.finish_reason,
        ttft_s=course.first_token_s,
        tpot_s=decode_s / (new_tokens - 1) if new_tokens > 1 else None,
        tokens_per_s=new_tokens / course.last_token_s,
        iterations=course.iterations,
        drafted=course.drafted,
        accepted=course.accepted,
        acceptance=course.accepted / course.drafted if course.drafted else None,
        tokens_per_iteration=new_tokens / course.iterations,
        hits=used.hits,
        late=used.late,
        misses=used.misses,
        hit_rate=used.hits / used.needed if used.needed else None,
        demand_bytes=used.demand_bytes,
        prefetch_used_bytes=used.prefetch_used_bytes,
        prefetch_wasted_bytes=used.prefetch_wasted_bytes,
        bytes_per_token=used.link_bytes / new_tokens,
        stall_s=used.stall_s,
        compute_s=used.compute_s,
        link_busy_s=used.link_busy_s,
        link_gbps=used.link_bytes / used.link_busy_s / 1e9 if used.link_busy_s else None,
        expert_memory_bytes=expert_memory_bytes,
        expert_total_bytes=expert_total_bytes,
        pinned_bytes=pinned_bytes,
        pinned_gbps=pinned_bytes / stats["pinned_fill_s"] / 1e9 if pinned_bytes else None,
        device=stats["device"],
        peak_rss_bytes=peak_rss_bytes(),
    )
