"""Rough costs of a pair, measured as it is loaded, on the runtime that is then used.

Bounded in time and in bytes: of each cost one sample is taken, and more while neither is spent.
A layer of the target becomes true as iterations are observed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from spmoe.costs import probe
from spmoe.costs.costs import Costs
from spmoe.models.cached import CausalLM
from spmoe.models.loading import TargetModel
from spmoe.reporting.progress import Progress, silent
from spmoe.runtime import Runtime

LIMIT_S = 1.0
LIMIT_BYTES = 1 << 30

_ROUNDS = 8  # of samples; the first prepares: pages are touched, kernels chosen
_LARGEST_BATCH = 8  # experts that a layer demands at once
_CONTEXT = 16  # tokens
_FAST_STEP_S = 0.05  # a draft step up to so long is beside what copies take from compute


@dataclass(slots=True)
class _Meter:
    """Takes samples on a runtime and counts what they take.

    Attributes:
        runtime: As new before each sample.
        end_s: When time is spent, in seconds of `time.perf_counter`.
        left_bytes: That may still be moved.
    """

    runtime: Runtime
    end_s: float
    left_bytes: int

    def sample(self, sampler: Iterator[float]) -> float:
        self.runtime.reset()
        seconds = next(sampler)
        self.left_bytes -= self.runtime.counters().link_bytes
        return seconds

    def affords(self, experts: int) -> bool:
        blob = self.runtime.store.blob_bytes
        return time.perf_counter() < self.end_s and experts * blob <= self.left_bytes


def estimate(
    target: TargetModel,
    draft: CausalLM | None,
    runtime: Runtime,
    *,
    limit_s: float = LIMIT_S,
    limit_bytes: int = LIMIT_BYTES,
    progress: Progress | None = None,
) -> Costs:
    """Return rough costs; the runtime is as new before and after.

    Args:
        target: Its experts need not be attached.
        draft: Perhaps none.
        runtime: Of the target's experts. Only for a policy that the costs limit it is
            measured what a prefetch takes from compute.
        limit_s: After so many seconds no sample begins but the first of each cost.
        limit_bytes: No more is read of experts, save that one expert is read for each cost.
        progress: Called after each round of samples, with a description, and done of total.

    Raises:
        DeviceError: An expert cannot be read.
    """
    report = progress or silent
    meter = _Meter(runtime, time.perf_counter() + limit_s, limit_bytes)
    copy_s = meter.sample(probe.copies(runtime, 1))
    batch = _batch(meter, copy_s, limit_s)
    samplers: dict[str, Iterator[float]] = {"copy_s": probe.copies(runtime, batch)}
    samples: dict[str, list[float]] = {"copy_s": [copy_s] if batch == 1 else []}
    moved = dict.fromkeys(("draft_s", "draft_token_s"), 0) | {"copy_s": batch}
    work: Callable[[], object] = probe.head_reader(target.model)
    if draft is not None:
        vocabulary = int(target.model.config.get_text_config().vocab_size)
        tokens = [token % vocabulary for token in range(_CONTEXT)]
        steps = probe.draft_steps(draft, tokens)
        samplers |= {"draft_s": steps, "draft_token_s": probe.draft_tokens(draft, tokens)}
        if next(steps) <= _FAST_STEP_S:
            work = steps.__next__
    if runtime.traits.limited_by is not None:
        count = _beside(meter, work, copy_s, target.experts_per_token)
        moved["prefetch_s"] = count
        samplers["prefetch_s"] = probe.losses(
            runtime, min(count, target.experts_per_token), work, most=count
        )
    for number in range(_ROUNDS):
        for name, sampler in samplers.items():
            taken = samples.setdefault(name, [])
            if not taken or meter.affords(moved[name]):
                taken.append(meter.sample(sampler))
        report("estimating costs", number + 1, _ROUNDS)
    runtime.reset()
    return _costs(target, draft, batch, {name: _settled(taken) for name, taken in samples.items()})


def _batch(meter: _Meter, copy_s: float, limit_s: float) -> int:
    """Return how many experts to demand at once: two samples of them are afforded."""
    store = meter.runtime.store
    largest = min(_LARGEST_BATCH, store.expert_count, meter.runtime.stats(by_layer=False)["slots"])
    for batch in range(largest, 1, -1):
        if 4 * batch * store.blob_bytes <= meter.left_bytes and 4 * batch * copy_s <= limit_s:
            return batch
    return 1


def _beside(meter: _Meter, work: Callable[[], object], copy_s: float, most: int) -> int:
    """Return how many experts to prefetch beside some work, so that the link is busy meanwhile."""
    work()
    start = time.perf_counter()
    work()
    work_s = max(time.perf_counter() - start, probe.MIN_WORK_S)
    wanted = math.ceil(work_s / copy_s) + 1 if copy_s else most
    slots = int(meter.runtime.stats(by_layer=False)["slots"])
    afforded = meter.left_bytes // (4 * meter.runtime.store.blob_bytes)
    return max(1, min(wanted, slots, afforded))


def _settled(taken: list[float]) -> list[float]:
    """Return the samples without the one that prepared, if there are others."""
    return taken[1:] or taken


def _costs(
    target: TargetModel, draft: CausalLM | None, batch: int, samples: dict[str, list[float]]
) -> Costs:
    medians = {name: statistics.median(values) for name, values in samples.items()}
    lost = samples.get("prefetch_s", [0.0])
    # A prefetch that does not pay is worse than none, and this difference is the noisiest sample.
    doubt = probe.standard_error(lost) if len(lost) > 1 else 0.0
    draft_s = medians.get("draft_s", 0.0)
    depth = draft.config.get_text_config().num_hidden_layers if draft is not None else 1
    return Costs(
        draft_s=draft_s,
        layer_s={1: draft_s / depth},
        copy_s={batch: medians["copy_s"]},
        expert_bytes=target.store.blob_bytes,
        prefetch_s=medians.get("prefetch_s", 0.0) + doubt,
        draft_token_s=medians.get("draft_token_s", 0.0),
    )
