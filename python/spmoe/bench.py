"""`spmoe bench`: policies, budgets and draft lengths against each other and against the bound.

Every cell of the grid runs with a cold cache, prompt by prompt; cells take turns, so that drift of
the machine hits all alike. The target alone runs first: its tokens are what every cell must write.
"""

from __future__ import annotations

import itertools
import platform
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch

from spmoe import speculative
from spmoe.costs import Costs
from spmoe.engine import Engine
from spmoe.errors import InvalidArgument
from spmoe.metrics import cpu_model
from spmoe.models.cached import CachedCausalLM
from spmoe.models.loading import (
    load_draft,
    load_plain,
    load_target,
    load_tokenizer,
    resolve_dtype,
)
from spmoe.profile import Fingerprint, estimate, known_costs
from spmoe.progress import Progress, silent
from spmoe.prompts import Prompt
from spmoe.runtime import POLICIES, Runtime

Routing = list[tuple[int, list[int]]]


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the table."""

    policy: str
    eviction: str
    expert_memory: int | str
    draft_length: int | str


@dataclass(slots=True)
class Tally:
    """What a cell's runs came to."""

    token_s: list[float] = field(default_factory=list)  # of every token but the first
    ttft_s: list[float] = field(default_factory=list)
    new_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    iterations: int = 0
    identical: bool = True
    counters: dict[str, float] = field(default_factory=dict)
    expert_memory_bytes: int = 0
    eviction: str = ""


@dataclass(frozen=True, slots=True)
class _Models:
    target: Any
    tokenizer: Any
    draft: Any
    costs: Costs


_COUNTERS = (
    *("hits", "late", "misses", "link_bytes", "link_busy_s", "stall_s", "compute_s"),
    *("prefetch_wasted_bytes", "predicted_needs", "recalled"),
)


def bench(
    target: str | PathLike[str],
    draft: str | PathLike[str] | None,
    prompts: Sequence[Prompt],
    *,
    policies: Sequence[str] = POLICIES,
    evictions: Sequence[str] = ("auto",),
    expert_memory: Sequence[int | str] = ("10%", "25%", "50%"),
    draft_lengths: Sequence[int | str] = (4,),
    max_new_tokens: int = 128,
    repeats: int = 3,
    link_gbps: float = 0.0,
    degrade_prediction: float = 0.0,
    dtype: torch.dtype | str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the grid and return ``machine``, ``link_peak_gbps``, ``paced`` and ``rows``.

    Args:
        target: As for `load`.
        draft: As for `load`.
        prompts: What each cell decodes.
        policies: Of `spmoe.runtime.POLICIES`.
        evictions: Of `spmoe.runtime.EVICTIONS`, or "auto".
        expert_memory: As for `load`.
        draft_lengths: Tokens drafted an iteration, or "auto".
        max_new_tokens: Of each prompt.
        repeats: Runs of each cell.
        link_gbps: Paces the link; 0 means as fast as it goes.
        degrade_prediction: Share of predicted experts that are replaced by random ones.
        dtype: As for `load`.
        progress: Called after each run with a description, and done of total.

    Raises:
        InvalidArgument: A policy does not exist, or a setting is out of range.
    """
    if unknown := [policy for policy in policies if policy not in POLICIES]:
        raise InvalidArgument(f'policy "{unknown[0]}" asked; use some of {", ".join(POLICIES)}')
    if not 0 <= degrade_prediction <= 1 or repeats < 1:
        raise InvalidArgument(
            f"degrade_prediction must be in [0, 1] and repeats at least 1, got "
            f"{degrade_prediction} and {repeats}"
        )
    report = progress or silent
    grid = itertools.product(policies, evictions, expert_memory, draft_lengths)
    # The oracle replays a run's routing, and with "auto" no run is like another.
    cells = [
        cell
        for cell in itertools.starmap(Cell, grid)
        if (cell.policy, cell.draft_length) != ("oracle", "auto")
    ]
    models = _load(target, draft, dtype=resolve_dtype(dtype), link_gbps=link_gbps)
    runs = len(prompts) * (1 + len(draft_lengths) + repeats * len(cells))
    done = itertools.count(1)

    def tell(description: str) -> None:
        report(description, next(done), runs)

    with _engine(models, Cell("on-demand", "auto", "100%", 0)) as warm:
        encoded = [warm.encode(prompt.text) for prompt in prompts]
    alone = list(_alone(target, encoded, max_new_tokens, dtype, tell))
    compute = {
        length: _everything_resident(models, encoded, length, max_new_tokens, tell)
        for length in draft_lengths
    }
    tallies = {cell: Tally() for cell in cells}
    routings: dict[tuple[int | str, int | str, int], Routing] = {}
    for _ in range(repeats):
        for number, tokens in enumerate(encoded):
            for cell in cells:
                key = (cell.expert_memory, cell.draft_length, number)
                if cell.policy == "oracle" and key not in routings:
                    routings[key] = _record(models, cell, tokens, max_new_tokens)
                with _engine(models, cell, link_gbps=link_gbps) as engine:
                    if cell.policy == "oracle":
                        engine.runtime.replay_routing(routings[key])
                    if degrade_prediction:
                        _degrade(engine.runtime, degrade_prediction)
                    text = _run(engine, tokens, max_new_tokens, tallies[cell])
                tallies[cell].identical &= text == alone[number][: len(text)]
                tell(f"{cell.policy}, {cell.expert_memory}, draft length {cell.draft_length}")
    peak = _link_peak_gbps(models, link_gbps)
    rows = [_row(cell, tallies[cell], peak, len(prompts), dtype) for cell in cells]
    _add_bounds(rows, compute, peak)
    return {
        "machine": {
            "cpu": cpu_model(),
            "cores": torch.get_num_threads(),
            "system": platform.platform(),
            "torch": torch.__version__,
        },
        "link_peak_gbps": peak,
        "paced": bool(link_gbps),
        "degrade_prediction": degrade_prediction,
        "rows": rows,
    }


def _load(
    target: str | PathLike[str],
    draft: str | PathLike[str] | None,
    *,
    dtype: torch.dtype,
    link_gbps: float,
) -> _Models:
    loaded = load_target(target, dtype=dtype)
    drafter = load_draft(draft) if draft is not None else None
    fingerprint = Fingerprint.of(target, draft, dtype=dtype, device="auto", link_gbps=link_gbps)
    costs = known_costs(fingerprint) or estimate(
        loaded, drafter, expert_memory="50%", link_gbps=link_gbps
    )
    return _Models(loaded, load_tokenizer(target), drafter, costs)


def _engine(models: _Models, cell: Cell, *, link_gbps: float = 0.0) -> Engine:
    target = models.target
    runtime = target.open_runtime(
        expert_memory=cell.expert_memory,
        link_gbps=link_gbps,
        policy=cell.policy,
        eviction=cell.eviction,
    )
    draft = models.draft if cell.draft_length != 0 else None
    return Engine(
        target,
        models.tokenizer,
        runtime,
        draft=draft,
        draft_length=cell.draft_length,
        costs=models.costs,
    )


def _alone(
    target: str | PathLike[str], encoded: list[list[int]], count: int, dtype: Any, tell: Any
) -> Iterator[list[int]]:
    plain = load_plain(target, dtype=resolve_dtype(dtype))
    for tokens in encoded:
        iterations = speculative.decode(
            CachedCausalLM(plain), None, tokens, draft_length=0, max_length=len(tokens) + count
        )
        yield [token for iteration in iterations for token in iteration.tokens]
        tell("the target alone")


def _everything_resident(
    models: _Models, encoded: list[list[int]], length: int | str, count: int, tell: Any
) -> float:
    """Return seconds a token with nothing to wait for: the second of two runs is warm."""
    cell = Cell("on-demand", "auto", "100%", length)
    seconds = []
    with _engine(models, cell) as engine:
        _touch(engine.runtime)
        for tokens in encoded:
            tally = Tally()
            _run(engine, tokens, count, tally)
            seconds += tally.token_s
            tell("everything resident")
    return statistics.fmean(seconds)


def _touch(runtime: Runtime) -> None:
    """Need every expert once, layer by layer."""
    count = runtime.store.expert_count
    x = torch.zeros(count, runtime.store.hidden)
    for layer in range(runtime.store.layer_count):
        runtime.forward(layer, x, torch.arange(count)[:, None], torch.ones(count, 1))


def _link_peak_gbps(models: _Models, link_gbps: float) -> float:
    """Return 10^9 bytes a second over all experts in a row, slots touched before."""
    cell = Cell("on-demand", "auto", "25%", 0)
    with _engine(models, cell, link_gbps=link_gbps) as engine:
        _touch(engine.runtime)
        before = engine.runtime.stats()
        _touch(engine.runtime)
        after = engine.runtime.stats()
    moved = after["link_bytes"] - before["link_bytes"]
    return float(moved / (after["link_busy_s"] - before["link_busy_s"]) / 1e9)


def _record(models: _Models, cell: Cell, tokens: list[int], count: int) -> Routing:
    recording = Cell("on-demand", "auto", "100%", cell.draft_length)
    with _engine(models, recording) as engine:
        engine.runtime.record_routing()
        _run(engine, tokens, count, Tally())
        return engine.runtime.recorded_routing()


def _degrade(runtime: Runtime, share: float) -> None:
    """Exchange a share of the predicted experts, seeded, for random ones of the layer."""
    generator = random.Random(0)
    predict = runtime.predict

    def degraded(layer: int, scores: torch.Tensor, **options: Any) -> None:
        values = scores.clone()
        for expert in range(len(values)):
            if values[expert] > 1 and generator.random() < share:
                other = generator.randrange(len(values))
                values[[expert, other]] = values[[other, expert]]
        predict(layer, values, **options)

    runtime.predict = degraded  # type: ignore[assignment, method-assign]


def _run(engine: Engine, tokens: list[int], count: int, tally: Tally) -> list[int]:
    """Decode one prompt, add what it came to, and return its new tokens."""
    before = engine.runtime.stats()
    text: list[int] = []
    length: Any = engine.draft_length
    for iteration in engine.iterate(tokens, max_new_tokens=count, draft_length=length):
        seconds = iteration.draft_s + iteration.verify_s
        if not text:
            tally.ttft_s.append(seconds)
            before = engine.runtime.stats()
        else:
            tally.token_s += [seconds / len(iteration.tokens)] * len(iteration.tokens)
        text += iteration.tokens
        tally.drafted += iteration.drafted
        tally.accepted += iteration.accepted
        tally.iterations += 1
    after = engine.runtime.stats()
    for name in _COUNTERS:
        tally.counters[name] = tally.counters.get(name, 0) + after[name] - before[name]
    tally.new_tokens += len(text)
    tally.expert_memory_bytes = engine.runtime.expert_memory_bytes
    tally.eviction = after["eviction"]
    return text


def _row(cell: Cell, tally: Tally, peak_gbps: float, prompts: int, dtype: Any) -> dict[str, Any]:
    counters = tally.counters
    decoded = len(tally.token_s)
    needed = counters["hits"] + counters["late"] + counters["misses"]
    tpot = sorted(tally.token_s)
    busy_s = counters["link_busy_s"]
    gbps = counters["link_bytes"] / busy_s / 1e9 if busy_s else None

    def percentile(share: float) -> float:
        return tpot[min(int(share * decoded), decoded - 1)]

    return {
        "policy": cell.policy,
        "eviction": tally.eviction,
        "expert_memory": cell.expert_memory,
        "expert_memory_bytes": tally.expert_memory_bytes,
        "draft_length": cell.draft_length,
        "dtype": str(resolve_dtype(dtype)).removeprefix("torch."),
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
        "hit_rate": counters["hits"] / needed,
        "late_rate": counters["late"] / needed,
        "recall": counters["recalled"] / counters["predicted_needs"]
        if counters["predicted_needs"]
        else None,
        "bytes_per_token": counters["link_bytes"] / decoded,
        "wasted_share": max(0.0, counters["prefetch_wasted_bytes"] / counters["link_bytes"])
        if counters["link_bytes"]
        else 0.0,
        "link_gbps": gbps,
        "link_share": gbps / peak_gbps if gbps and peak_gbps else None,
        "stall_s_per_token": counters["stall_s"] / decoded,
        "compute_s_per_token": counters["compute_s"] / decoded,
        "bound_tpot_s": None,
        "ratio_to_bound": None,
        "identical": tally.identical,
    }


def _add_bounds(rows: list[dict[str, Any]], compute: dict[Any, float], peak_gbps: float) -> None:
    """No policy can beat compute alone, nor the oracle's bytes over the link's peak."""
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
            compute[row["draft_length"]], min(oracle_bytes) / (peak_gbps * 1e9)
        )
        row["ratio_to_bound"] = row["tpot_s"]["mean"] / row["bound_tpot_s"]
