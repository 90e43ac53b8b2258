"""Measured costs of one machine and pair, kept in the cache folder until something changes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch

from spmoe import probe
from spmoe.config import default_cache, parse_memory
from spmoe.costs import Costs
from spmoe.errors import InvalidArgument
from spmoe.metrics import cpu_model
from spmoe.models.cached import CachedCausalLM, CausalLM
from spmoe.models.checkpoint import find_checkpoint
from spmoe.models.experts import attach
from spmoe.models.loading import (
    TargetModel,
    load_draft,
    load_target,
    load_tokenizer,
    resolve_dtype,
)
from spmoe.progress import Progress, silent
from spmoe.prompts import load_prompts
from spmoe.runtime import Runtime

ROWS = (1, 2, 3, 5, 9, 17)  # of a verification
BATCHES = (1, 2, 4, 8)  # experts that a layer demands at once

log = logging.getLogger("spmoe")

_FORMAT = 1
_ESTIMATE_CONTEXT = 16  # tokens
_MEASURE_TOKENS = 64  # of the text that layers are measured on
_LINK_SLOTS = 16  # of the small pools that the link is measured with


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a profile holds for. It is stale once one of these differs.

    Attributes:
        pair: Digest of the configurations and sizes of target and draft.
        machine: Processor, cores, versions.
        settings: What of the settings changes costs: dtype, device, pacing.
    """

    pair: str
    machine: dict[str, str | int]
    settings: dict[str, str | float]

    @classmethod
    def of(
        cls,
        target: str | PathLike[str],
        draft: str | PathLike[str] | None,
        *,
        dtype: torch.dtype,
        device: str,
        link_gbps: float,
    ) -> Self:
        """Return the fingerprint of a pair, on this machine, with these settings."""
        models = [_describe(model) for model in (target, draft) if model is not None]
        return cls(
            pair=hashlib.sha256(json.dumps(models).encode()).hexdigest()[:16],
            machine={
                "cpu": cpu_model(),
                "cores": len(os.sched_getaffinity(0)),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "spmoe": version("spmoe"),
            },
            settings={"dtype": str(dtype), "device": device, "link_gbps": link_gbps},
        )

    @property
    def path(self) -> Path:
        """Where the profile of this pair and these settings is kept."""
        settings = json.dumps([self.pair, self.settings], sort_keys=True)
        digest = hashlib.sha256(settings.encode()).hexdigest()[:16]
        return default_cache() / "profiles" / f"{digest}.json"

    @property
    def layer_map_path(self) -> Path:
        """Where the `LayerMap` of this pair is kept."""
        return default_cache() / "profiles" / f"{self.pair}.safetensors"


@dataclass(frozen=True, slots=True)
class Profile:
    """Costs and how far their samples lie apart.

    Attributes:
        costs: Medians.
        spread: Name of a cost -> interquartile range of its samples over their median.
        fingerprint: What they hold for.
    """

    costs: Costs
    spread: dict[str, float]
    fingerprint: Fingerprint

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON knows it."""
        return asdict(self)

    def save(self) -> Path:
        """Write it to its place in the cache folder, whole or not at all; return the place."""
        path = self.fingerprint.path
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"format": _FORMAT} | self.as_dict(), indent=1))
        partial.replace(path)
        return path


def find_profile(fingerprint: Fingerprint) -> Profile | None:
    """Return the profile kept for this fingerprint, None if there is none.

    Raises:
        InvalidArgument: There is one, but it is stale or damaged; the message says which.
    """
    try:
        kept = json.loads(fingerprint.path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        kept = {}
    if kept.get("format") != _FORMAT:
        raise InvalidArgument(
            f"{fingerprint.path} is not a profile of this version: run `spmoe profile` again"
        )
    for name, found in fingerprint.machine.items():
        if (measured := kept["fingerprint"]["machine"].get(name)) != found:
            raise InvalidArgument(
                f'the profile was measured with {name} "{measured}", but here it is "{found}": '
                "run `spmoe profile` again"
            )
    costs = kept["costs"]
    for name in ("layer_s", "copy_s"):
        costs[name] = {int(at): seconds for at, seconds in costs[name].items()}
    return Profile(Costs(**costs), kept["spread"], fingerprint)


def known_costs(fingerprint: Fingerprint) -> Costs | None:
    """Return the costs kept for this fingerprint; None, with a warning if there are stale ones."""
    try:
        kept = find_profile(fingerprint)
    except InvalidArgument as stale:
        log.warning("%s; estimating instead", stale)
        return None
    return kept.costs if kept is not None else None


def make_profile(
    target: str | PathLike[str],
    draft: str | PathLike[str] | None,
    *,
    expert_memory: int | str = "50%",
    dtype: torch.dtype | str | None = None,
    device: str = "auto",
    link_gbps: float = 0.0,
    repeats: int = 7,
    progress: Progress | None = None,
) -> Profile:
    """Load a pair and measure it; the result is not saved yet. Arguments as for `spmoe.load`."""
    chosen = resolve_dtype(dtype)
    loaded = load_target(target, dtype=chosen)
    drafter = load_draft(draft) if draft is not None else None
    text = load_prompts()[0].text
    tokens: list[int] = load_tokenizer(target)(text)["input_ids"]
    costs, spread = measure(
        loaded,
        drafter,
        (tokens * _MEASURE_TOKENS)[:_MEASURE_TOKENS],
        expert_memory=expert_memory,
        repeats=repeats,
        device=device,
        link_gbps=link_gbps,
        progress=progress,
    )
    fingerprint = Fingerprint.of(target, draft, dtype=chosen, device=device, link_gbps=link_gbps)
    return Profile(costs, spread, fingerprint)


def estimate(
    target: TargetModel, draft: CausalLM | None, *, expert_memory: int | str, **options: Any
) -> Costs:
    """Return rough costs in about a second; a layer's become true as iterations are observed.

    Arguments as for `measure`; holds no more than ``expert_memory`` meanwhile.
    """
    vocabulary = int(target.model.config.get_text_config().vocab_size)
    tokens = [token % vocabulary for token in range(_ESTIMATE_CONTEXT)]
    costs, _ = measure(
        target,
        draft,
        tokens,
        expert_memory=expert_memory,
        repeats=3,
        rows=(),
        batches=(8,),
        **options,
    )
    return costs


def measure(
    target: TargetModel,
    draft: CausalLM | None,
    tokens: Sequence[int],
    *,
    expert_memory: int | str,
    repeats: int = 7,
    rows: Sequence[int] = ROWS,
    batches: Sequence[int] = BATCHES,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[Costs, dict[str, float]]:
    """Measure a pair on this machine, a sample of each cost in turn, so that drift hits all alike.

    Args:
        target: If layers are measured, a runtime that is closed by then is attached afterwards.
        draft: Perhaps none.
        tokens: A text, longer than the most rows.
        expert_memory: To measure layers in, as for `Runtime`; larger is truer, since their experts
            should be resident.
        repeats: Samples of each cost.
        rows: Of a verification; none: a layer is taken to cost what one of the draft does.
        batches: Experts that a layer demands at once.
        progress: Called after each round, with a description, and done of total.
        **options: Of `Runtime`: device, pacing.

    Returns:
        The costs, and the spread of each.
    """
    report = progress or silent
    with ExitStack() as pools:
        small = pools.enter_context(_small_pool(target, expert_memory, **options))
        samplers: dict[tuple[str, int], Iterator[float]] = {}
        work = _read_head(target)
        if draft is not None:
            samplers["draft_s", 0] = probe.draft_steps(draft, tokens)
            work = _draft_step(draft, tokens)
        if rows:
            runtime = target.open_runtime(expert_memory=expert_memory, **options)
            attach(target, pools.enter_context(runtime))
        for at in rows:
            samplers["layer_s", at] = probe.target_layers(target, runtime, tokens, at)
        largest = min(target.store.expert_count, small.stats(by_layer=False)["slots"])
        for at in sorted({min(batch, largest) for batch in batches}):
            samplers["copy_s", at] = probe.copies(small, at)
        samplers["prefetch_s", 0] = probe.losses(small, work)
        samples: dict[tuple[str, int], list[float]] = {key: [] for key in samplers}
        for number in range(repeats + 1):
            for key, sampler in samplers.items():
                samples[key].append(next(sampler))
            report("measuring costs", number, repeats)
    # The first round prepares: pages are touched, kernels chosen.
    medians = {key: statistics.median(values[1:]) for key, values in samples.items()}
    by_name: dict[str, dict[int, float]] = {"layer_s": {}, "copy_s": {}}
    for (name, at), seconds in medians.items():
        by_name.setdefault(name, {})[at] = seconds
    draft_s = medians.get(("draft_s", 0), 0.0)
    depth = draft.config.get_text_config().num_hidden_layers if draft is not None else 1
    costs = Costs(
        draft_s=draft_s,
        layer_s=by_name["layer_s"] or {1: draft_s / depth},
        copy_s=by_name["copy_s"],
        expert_bytes=target.store.blob_bytes,
        prefetch_s=medians["prefetch_s", 0],
    )
    spread = {
        f"{name}[{at}]" if at else name: _spread(values[1:])
        for (name, at), values in samples.items()
    }
    return costs, spread


def _small_pool(target: TargetModel, expert_memory: int | str, **options: Any) -> Runtime:
    """Return a runtime to measure the link with: larger than a batch, smaller than the budget."""
    store = target.store
    slots = min(_LINK_SLOTS, store.layer_count * store.expert_count // 2)
    wanted = max(slots, target.experts_per_token) * -(-store.blob_bytes // 256) * 256
    given = parse_memory(expert_memory, store.total_bytes)
    return target.open_runtime(expert_memory=min(wanted, given), policy="sp-moe", **options)


def _draft_step(draft: CausalLM, tokens: Sequence[int]) -> Any:
    model = CachedCausalLM(draft)
    model.read(tokens)

    def step() -> None:
        model.read(tokens[-1:])
        model.rewind(len(tokens))

    return step


def _read_head(target: TargetModel) -> Any:
    """Return work that reads much memory, as decoding does: the target's own output layer."""
    model: Any = target.model
    head = model.get_output_embeddings()
    state = torch.zeros(1, head.weight.shape[1], dtype=head.weight.dtype)
    return lambda: torch.nn.functional.linear(state, head.weight)


def _spread(values: Sequence[float]) -> float:
    """Return the interquartile range over the median."""
    if len(values) < 2:
        return 0.0
    first, middle, third = statistics.quantiles(values, n=4)
    return (third - first) / middle if middle else 0.0


def _describe(model: str | PathLike[str]) -> Mapping[str, Any]:
    checkpoint = find_checkpoint(model)
    return {
        "config": json.loads((checkpoint.directory / "config.json").read_text(encoding="utf-8")),
        "files": {shard.name: shard.stat().st_size for shard in checkpoint.shards},
    }
