"""Bounds of every policy: compute alone, the oracle's bytes on the link, and what slots hold."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from spmoe.bench.cell import Cell, Models, Tally, open_engine, run_prompt
from spmoe.costs import probe
from spmoe.policies import BASELINE, PROBE, traits_of
from spmoe.runtime import Runtime

_PEAK_SAMPLES = 5  # of which the best counts

Routing = list[tuple[int, list[int]]]


def run_resident(
    models: Models, length: int | str, tokens: list[int], count: int, tally: Tally
) -> None:
    """Add what decoding takes with nothing to wait for."""
    with open_engine(models, Cell(BASELINE, "auto", "100%", length)) as engine:
        touch_all(engine.runtime)
        run_prompt(engine, tokens, count, tally)


def touch_all(runtime: Runtime) -> None:
    """Access every expert once, layer by layer."""
    count = runtime.store.expert_count
    x = torch.zeros(count, runtime.store.hidden, device=runtime.device)
    weights = torch.ones(count, 1, device=runtime.device)
    for layer in range(runtime.store.layer_count):
        runtime.forward(layer, x, torch.arange(count)[:, None], weights)
    runtime.end_iteration()  # all of them are there


def link_peak_gbps(models: Models) -> float:
    """Return what the link moves at best, nothing computed beside, 10^9 bytes a second."""
    cell = Cell(PROBE, "auto", "25%", 0)
    with open_engine(models, cell, paced=True) as engine:
        rates = probe.rates(engine.runtime, models.target.experts_per_token)
        next(rates)  # slots are touched
        return max(itertools.islice(rates, _PEAK_SAMPLES))


def record_routing(models: Models, length: int | str, tokens: list[int], count: int) -> Routing:
    """Return what a run of this draft length needs, layer by layer."""
    recording = Cell(BASELINE, "auto", "100%", length)
    with open_engine(models, recording) as engine:
        engine.runtime.record_routing()
        run_prompt(engine, tokens, count, Tally())
        return engine.runtime.recorded_routing()


def slot_bound_s(tally: Tally, resident: Tally, peak_gbps: float) -> float:
    """Return the least seconds a token that the number of slots allows.

    However well all is foreseen, no more than the slots hold can be there when verification begins;
    what else a pass needs crosses the link while it runs. Compute alone, if that takes longer.

    Args:
        tally: Of a cell; what its passes needed.
        resident: Of the same draft length, with everything resident.
        peak_gbps: Of the link.
    """
    fills = max(0.0, tally.counters.needed - tally.slots * tally.passes) / len(tally.token_s)
    verify_s = fills * tally.expert_bytes / (peak_gbps * 1e9)
    draft_s = resident.draft_s / len(resident.token_s)
    return max(statistics.fmean(resident.token_s), draft_s + verify_s)


def add_bounds(
    rows: list[dict[str, Any]],
    tallies: Iterable[Tally],
    resident: Mapping[int | str, Tally],
    peak_gbps: float,
) -> None:
    """Set the bounds of rows, and how many times as long they took.

    `bound_tpot_s` is the larger of compute alone and the oracle's bytes over the link's peak, where
    the oracle ran with the same memory and draft length; `slot_bound_tpot_s` is `slot_bound_s`.

    Args:
        rows: From `to_row`.
        tallies: Of each row.
        resident: Draft length -> runs with everything resident.
        peak_gbps: Of the link.
    """
    if not peak_gbps:
        return
    for row, tally in zip(rows, tallies, strict=True):
        alone = resident[row["draft_length"]]
        bounds = {"slot_bound": slot_bound_s(tally, alone, peak_gbps)}
        same = ("expert_memory", "draft_length")
        oracle_bytes = [
            other["bytes_per_token"]
            for other in rows
            if traits_of(other["policy"]).replays and all(other[key] == row[key] for key in same)
        ]
        if oracle_bytes:
            link_s = min(oracle_bytes) / (peak_gbps * 1e9)
            bounds["bound"] = max(statistics.fmean(alone.token_s), link_s)
        for name, bound_s in bounds.items():
            row[f"{name}_tpot_s"] = bound_s
            row[f"ratio_to_{name}"] = row["tpot_s"]["mean"] / bound_s
