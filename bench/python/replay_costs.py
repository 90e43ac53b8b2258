"""Costs of experts alone on a machine, which a `Replay` plans with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from replay import Pace, Tensors, access_all
from spmoe.costs import probe
from spmoe.costs.costs import Costs
from spmoe.errors import InvalidArgument
from spmoe.runtime import Runtime

_SAMPLES = 7  # of a cost; the median counts
_WORK_BYTES = 64 << 20  # that compute reads beside copies, larger than most caches


def measure_costs(
    runtime: Runtime, experts_per_token: int, *, rows: int, pace: Pace, tensors: Tensors
) -> tuple[Costs, float]:
    """Return this machine's costs, and the link's peak in 10^9 bytes a second.

    Args:
        runtime: Of the policy "sp-moe", with slots for the experts of one layer.
        experts_per_token: The model's top-k.
        rows: Of a verification.
        pace: Of what is slept.
        tensors: Of activations.

    Raises:
        InvalidArgument: The model has one layer, so that nothing crosses the link twice.
    """
    store = runtime.store
    if store.layer_count < 2:
        raise InvalidArgument(
            "a model of one layer stays in the slots that the link is measured with: give it two "
            "layers or more"
        )
    access_all(runtime, tensors)  # slots and pages are touched
    used = access_all(runtime, tensors)
    peak_gbps = used.link_bytes / used.link_busy_s / 1e9
    layer_s = _resident_layer_s(runtime, experts_per_token, rows, tensors)
    sampler = probe.losses(runtime, experts_per_token, _memory_reader(tensors))
    costs = Costs(
        draft_s=pace.draft_s,
        layer_s={rows: layer_s + pace.dense_s},
        copy_s={1: store.blob_bytes / peak_gbps / 1e9},
        expert_bytes=store.blob_bytes,
        prefetch_s=_median(lambda: next(sampler)),
    )
    return costs, peak_gbps


def _resident_layer_s(
    runtime: Runtime, experts_per_token: int, rows: int, tensors: Tensors
) -> float:
    """Return how long a layer runs whose rows use as many experts as they can, all resident."""
    store = runtime.store
    x, weights = tensors.ones(rows, store.hidden), tensors.ones(rows, experts_per_token)
    index = torch.arange(rows * experts_per_token, device=tensors.device) % store.expert_count

    def seconds() -> float:
        tensors.wait()
        start = time.perf_counter()
        runtime.forward(0, x, index.reshape(weights.shape), weights)
        tensors.wait()
        took = time.perf_counter() - start
        runtime.end_iteration()
        return took

    return _median(seconds)


def _median(sample: Callable[[], float]) -> float:
    return statistics.median([sample() for _ in range(_SAMPLES + 1)][1:])  # the first one prepares


def _memory_reader(tensors: Tensors) -> Callable[[], object]:
    """Return work that reads much memory, as decoding does."""
    side = int((_WORK_BYTES / tensors.dtype.itemsize) ** 0.5)
    weight, state = tensors.ones(side, side), tensors.ones(1, side)
    return lambda: torch.nn.functional.linear(state, weight).sum().item()
