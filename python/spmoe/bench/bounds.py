"""What no policy can beat: compute with everything resident, and the oracle's bytes on the link."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from spmoe.bench.cell import Cell, Models, Tally, open_engine, run_prompt
from spmoe.runtime import Runtime

Routing = list[tuple[int, list[int]]]


def run_resident(models: Models, length: int | str, tokens: list[int], count: int) -> list[float]:
    """Return seconds of each token but the first with nothing to wait for."""
    tally = Tally()
    with open_engine(models, Cell("on-demand", "auto", "100%", length)) as engine:
        touch_all(engine.runtime)
        run_prompt(engine, tokens, count, tally)
    return tally.token_s


def touch_all(runtime: Runtime) -> None:
    """Need every expert once, layer by layer."""
    count = runtime.store.expert_count
    x = torch.zeros(count, runtime.store.hidden, device=runtime.device)
    weights = torch.ones(count, 1, device=runtime.device)
    for layer in range(runtime.store.layer_count):
        runtime.forward(layer, x, torch.arange(count)[:, None], weights)
    runtime.end_iteration()  # all of them are there


def link_peak_gbps(models: Models, link_gbps: float) -> float:
    """Return 10^9 bytes a second over all experts in a row, slots touched before."""
    cell = Cell("on-demand", "auto", "25%", 0)
    with open_engine(models, cell, link_gbps=link_gbps) as engine:
        touch_all(engine.runtime)
        before = engine.runtime.stats()
        touch_all(engine.runtime)
        after = engine.runtime.stats()
    moved = after["link_bytes"] - before["link_bytes"]
    return float(moved / (after["link_busy_s"] - before["link_busy_s"]) / 1e9)


def record_routing(models: Models, length: int | str, tokens: list[int], count: int) -> Routing:
    """Return what a run of this draft length needs, layer by layer."""
    recording = Cell("on-demand", "auto", "100%", length)
    with open_engine(models, recording) as engine:
        engine.runtime.record_routing()
        run_prompt(engine, tokens, count, Tally())
        return engine.runtime.recorded_routing()


def add_bounds(
    rows: list[dict[str, Any]], resident_s: dict[Any, list[float]], peak_gbps: float
) -> None:
    """Set `bound_tpot_s` and `ratio_to_bound` of rows whose memory and draft length oracle ran.

    The bound is the larger of compute alone and the oracle's bytes over the link's peak.

    Args:
        rows: From `to_row`.
        resident_s: Draft length -> seconds of tokens with everything resident.
        peak_gbps: Of the link.
    """
    for row in rows:
        same = ("expert_memory", "draft_length")
        oracle_bytes = [
            other["bytes_per_token"]
            for other in rows
            if other["policy"] == "oracle" and all(other[key] == row[key] for key in same)
        ]
        if not oracle_bytes or not peak_gbps:
            continue
        row["bound_tpot_s"] = max(
            statistics.fmean(resident_s[row["draft_length"]]),
            min(oracle_bytes) / (peak_gbps * 1e9),
        )
        row["ratio_to_bound"] = row["tpot_s"]["mean"] / row["bound_tpot_s"]
