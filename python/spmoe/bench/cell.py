"""One cell of a bench's grid: its settings, its runs, its row in the table."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

import torch

from spmoe.costs.costs import Costs
from spmoe.costs.estimate import estimate
from spmoe.costs.profile import Fingerprint, known_costs, known_layer_map
from spmoe.engine import Engine
from spmoe.models.loading import load_draft, load_target, load_tokenizer
from spmoe.policies import PROBE
from spmoe.prediction.layer_map import LayerMap
from spmoe.reporting.counters import Counters
from spmoe.settings import Settings, check_dtype


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the table."""

    policy: str
    eviction: str
    expert_memory: int | str
    draft_length: int | str


@dataclass(slots=True)
class Tally:
    """The sums over a cell's runs."""

    token_s: list[float] = field(default_factory=list)  # of every token but the first
    ttft_s: list[float] = field(default_factory=list)
    new_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    iterations: int = 0
    draft_s: float = 0.0  # of every iteration but the first of a run
    identical: bool = True
    counters: Counters = field(default_factory=Counters)  # without the first iterations
    expert_memory_bytes: int = 0
    expert_bytes: int = 0
    slots: int = 0
    eviction: str = ""

    @property
    def passes(self) -> int:
        """Verifications; the first iteration of a run reads the prompt."""
        return self.iterations - len(self.ttft_s)


@dataclass(frozen=True, slots=True)
class Models:
    """A loaded pair, and what it costs on this machine; cells share it."""

    target: Any
    tokenizer: Any
    draft: Any
    costs: Costs
    layer_map: LayerMap | None
    settings: Settings


def load_models(
    target: str | PathLike[str],
    draft: str | PathLike[str] | None,
    settings: Settings,
) -> Models:
    """Load a pair. Its costs are those that `spmoe profile` kept, or else are estimated.

    Args:
        target: As for `spmoe.load`.
        draft: As for `spmoe.load`.
        settings: Of all cells; what a `Cell` has is of no account.
    """
    loaded = load_target(target, dtype=check_dtype(settings.dtype), device=settings.place)
    drafter = load_draft(draft, device=settings.place) if draft is not None else None
    fingerprint = Fingerprint.of(target, draft, settings, dtype=loaded.model.dtype)
    costs = known_costs(fingerprint)
    if costs is None:
        with loaded.open_runtime(replace(settings, expert_memory="50%", policy=PROBE)) as runtime:
            costs = estimate(loaded, drafter, runtime)
    layer_map = known_layer_map(fingerprint)
    return Models(loaded, load_tokenizer(target), drafter, costs, layer_map, settings)


def open_engine(models: Models, cell: Cell, *, paced: bool = False) -> Engine:
    """Return an engine for a cell, with a cold cache; ``paced`` as the settings are, or not."""
    target = models.target
    runtime = target.open_runtime(
        replace(
            models.settings,
            expert_memory=cell.expert_memory,
            policy=cell.policy,
            eviction=cell.eviction,
            link_gbps=models.settings.link_gbps if paced else 0.0,
        )
    )
    draft = models.draft if cell.draft_length != 0 else None
    return Engine(
        target,
        models.tokenizer,
        runtime,
        draft=draft,
        draft_length=cell.draft_length,
        costs=models.costs,
        layer_map=models.layer_map,
    )


def run_prompt(engine: Engine, tokens: list[int], count: int, tally: Tally) -> list[int]:
    """Decode one prompt, add what it came to, and return its new tokens."""
    length: Any = engine.draft_length
    iterations = engine.iterate(tokens, max_new_tokens=count, draft_length=length)
    first = next(iterations)
    tally.ttft_s.append(first.draft_s + first.verify_s)
    tally.iterations += 1
    text = list(first.tokens)
    with engine.runtime.counting() as used:
        for iteration in iterations:
            seconds = iteration.draft_s + iteration.verify_s
            tally.token_s += [seconds / len(iteration.tokens)] * len(iteration.tokens)
            tally.draft_s += iteration.draft_s
            text += iteration.tokens
            tally.drafted += iteration.drafted
            tally.accepted += iteration.accepted
            tally.iterations += 1
    tally.counters += used
    tally.new_tokens += len(text)
    after = engine.runtime.stats(by_layer=False)
    tally.expert_memory_bytes = engine.runtime.expert_memory_bytes
    tally.expert_bytes = engine.runtime.store.blob_bytes
    tally.slots = after["slots"]
    tally.eviction = after["eviction"]
    return text


def shares(used: Counters) -> dict[str, float | None]:
    """Return how experts were found when needed, and how good prefetches were, as shares."""
    wasted = used.prefetch_wasted_bytes / used.link_bytes if used.link_bytes else 0.0
    return {
        "hit_rate": used.hits / used.needed,
        "late_rate": used.late / used.needed,
        "recall": used.recalled / used.predicted_accesses if used.predicted_accesses else None,
        "wasted_share": max(0.0, wasted),
    }


def to_row(
    cell: Cell, tally: Tally, *, peak_gbps: float, prompts: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the cell's figures under the keys that scripts rely on; the bounds come later."""
    used = tally.counters
    decoded = len(tally.token_s)
    tpot = sorted(tally.token_s)
    gbps = used.link_bytes / used.link_busy_s / 1e9 if used.link_busy_s else None

    def percentile(share: float) -> float:
        return tpot[min(int(share * decoded), decoded - 1)]

    return {
        "policy": cell.policy,
        "eviction": tally.eviction,
        "expert_memory": cell.expert_memory,
        "expert_memory_bytes": tally.expert_memory_bytes,
        "draft_length": cell.draft_length,
        "dtype": str(dtype).removeprefix("torch."),
        "prompts": prompts,
        "new_tokens": tally.new_tokens,
        "ttft_s": statistics.fmean(tally.ttft_s),
        "tpot_s": {
            "mean": statistics.fmean(tpot),
            "p50": percentile(0.5),
            "p90": percentile(0.9),
            "p99": percentile(0.99),
        },
        "tokens_per_s": decoded / sum(tpot),
        "acceptance": tally.accepted / tally.drafted if tally.drafted else None,
        "tokens_per_iteration": tally.new_tokens / tally.iterations,
        **shares(used),
        "bytes_per_token": used.link_bytes / decoded,
        "link_gbps": gbps,
        "link_share": gbps / peak_gbps if gbps and peak_gbps else None,
        "stall_s_per_token": used.stall_s / decoded,
        "compute_s_per_token": used.compute_s / decoded,
        "bound_tpot_s": None,
        "ratio_to_bound": None,
        "slot_bound_tpot_s": None,
        "ratio_to_slot_bound": None,
        "identical": tally.identical,
    }
