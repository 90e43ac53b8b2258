"""Measuring what one machine needs for one pair.

Draft steps, target layers, the link, and what copies take from compute.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from spmoe.models.cache_support import cached
from spmoe.models.cached import CausalLM
from spmoe.models.loading import TargetModel
from spmoe.runtime import Runtime

_POLL_S = 0.0002
MIN_WORK_S = 0.02  # of compute beside copies: shorter is lost in the noise


def draft_steps(draft: CausalLM, tokens: Sequence[int]) -> Iterator[float]:
    """Yield seconds of one draft step after another, without end, behind ``tokens``."""
    model = cached(draft)
    model.read(tokens)
    model.read(tokens[-1:])  # the first one prepares
    while True:
        start = time.perf_counter()
        _choose(model.read(tokens[-1:]))
        yield time.perf_counter() - start
        model.rewind(len(tokens))


def draft_tokens(draft: CausalLM, tokens: Sequence[int]) -> Iterator[float]:
    """Yield seconds that each further token of a pass of the draft takes, without end.

    Args:
        draft: The model.
        tokens: Three at least.
    """
    model = cached(draft)
    model.read(tokens[:1])
    while True:
        seconds = []
        for end in (2, len(tokens)):
            start = time.perf_counter()
            _choose(model.read(tokens[1:end]))
            seconds.append(time.perf_counter() - start)
            model.rewind(1)
        yield max(0.0, seconds[1] - seconds[0]) / (len(tokens) - 2)


def target_layers(
    target: TargetModel, runtime: Runtime, tokens: Sequence[int], rows: int
) -> Iterator[float]:
    """Yield seconds of one target layer over ``rows`` tokens, waits for the link left out.

    Args:
        target: With ``runtime`` attached.
        runtime: Of the policy "on-demand".
        tokens: More than ``rows``, of a text.
        rows: Tokens of a pass.
    """
    model = cached(target.model)
    context = len(tokens) - rows
    model.read(tokens[:context])
    while True:
        with runtime.counting() as used:
            start = time.perf_counter()
            _choose(model.read(tokens[context:], last=rows))
            seconds = time.perf_counter() - start
        yield (seconds - used.stall_s) / len(target.moe_layers)
        model.rewind(context)


def copies(runtime: Runtime, batch: int) -> Iterator[float]:
    """Yield seconds that the link takes for ``batch`` experts that one layer demands.

    A batch of which nothing has to be moved is passed over, one of which a part has to counts by
    that; where all are resident it yields 0.

    Args:
        runtime: With fewer slots than the model has experts.
        batch: No more than a layer has, nor than there are slots.
    """
    store = runtime.store
    x = torch.zeros(batch, store.hidden, device=runtime.device)
    weights = torch.ones(batch, 1, device=runtime.device)
    tour = _tour(runtime, batch)
    round_length = store.layer_count * (store.expert_count // batch)
    while True:
        seconds = 0.0
        for layer, experts in itertools.islice(tour, round_length):
            with runtime.counting() as used:
                runtime.forward(layer, x, torch.tensor(experts)[:, None], weights)
                _settle(runtime)
            if moved := used.link_bytes / store.blob_bytes:
                seconds = used.link_busy_s * batch / moved
                break
        yield seconds


def losses(
    runtime: Runtime,
    experts_per_token: int,
    work: Callable[[], object],
    *,
    most: int | None = None,
) -> Iterator[float]:
    """Yield seconds that an expert which arrives meanwhile takes from compute.

    Args:
        runtime: Of a policy that prefetches, with fewer slots than the model has experts.
        experts_per_token: The model's top-k.
        work: Some compute, always the same.
        most: Experts that are prefetched a sample; None: as many as there are slots.
    """
    store = runtime.store
    tour = _tour(runtime, experts_per_token)
    start = time.perf_counter()
    work()
    times = max(1, round(MIN_WORK_S / (time.perf_counter() - start)))

    def seconds() -> float:
        start = time.perf_counter()
        for _ in range(times):
            work()
        return time.perf_counter() - start

    while True:
        alone = seconds()
        with runtime.counting() as used:
            _prefetch(runtime, tour, experts_per_token, most)
            beside = seconds()
        moved = used.link_bytes / store.blob_bytes
        _settle(runtime)
        yield max(0.0, beside - alone) / moved if moved else 0.0


def rates(runtime: Runtime, experts_per_token: int) -> Iterator[float]:
    """Yield the rate at which the link fills all slots, nothing computed beside, 10^9 bytes/s.

    Arguments as for `losses`. Resident experts take no time: it yields 0 if all are.
    """
    tour = _tour(runtime, experts_per_token)
    while True:
        with runtime.counting() as used:
            _prefetch(runtime, tour, experts_per_token)
            _settle(runtime)
        yield used.link_bytes / used.link_busy_s / 1e9 if used.link_bytes else 0.0


def head_reader(model: Any) -> Callable[[], object]:
    """Return work that reads much memory, as decoding does: a model's own output layer."""
    head = model.get_output_embeddings()
    state = torch.zeros(1, head.weight.shape[1], dtype=head.weight.dtype, device=head.weight.device)
    return lambda: int(torch.nn.functional.linear(state, head.weight).argmax())


def standard_error(values: Sequence[float]) -> float:
    """Return that of the median, from the interquartile range."""
    first, _, third = statistics.quantiles(values, n=4)
    return (third - first) / math.sqrt(len(values))


def _choose(logits: torch.Tensor) -> None:
    """Take the likeliest tokens, as decoding does: that waits for a device that runs behind."""
    logits.argmax(dim=-1).tolist()


def _tour(runtime: Runtime, batch: int) -> Iterator[tuple[int, list[int]]]:
    """Yield (layer, experts) round all experts, so that the longest unused come next."""
    store = runtime.store
    for start in itertools.cycle(range(0, store.expert_count - batch + 1, batch)):
        for layer in range(store.layer_count):
            yield layer, list(range(start, start + batch))


def _prefetch(
    runtime: Runtime,
    tour: Iterator[tuple[int, list[int]]],
    experts_per_token: int,
    most: int | None = None,
) -> None:
    """Have experts of ``tour`` prefetched: ``most`` of them, or as many as there are slots."""
    runtime.end_iteration()
    count = runtime.stats(by_layer=False)["slots"] if most is None else most
    rounds = count // experts_per_token
    for layer, experts in itertools.islice(tour, rounds):
        scores = torch.zeros(runtime.store.expert_count)
        scores[list(experts)] = 2.0  # selected
        runtime.predict(layer, scores)


def _settle(runtime: Runtime) -> None:
    """Wait until no copy is in flight."""
    busy_s = -1.0
    while (now := runtime.stats(by_layer=False))["queue_depth"] or now["link_busy_s"] != busy_s:
        busy_s = now["link_busy_s"]
        time.sleep(_POLL_S)
