"""Router rows from text: which expert a token goes to depends on what the token is about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import LlamaForCausalLM

from spmoe.reporting.progress import Progress

_ITERATIONS = 20


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, so that sums have one order and the result is always the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def ffn_inputs(
    model: LlamaForCausalLM, documents: Sequence[Sequence[int]], *, progress: Progress
) -> list[Tensor]:
    """Return what each layer's FFN reads on a text.

    Args:
        model: Dense, in float32.
        documents: Token ids of each.
        progress: Called for each document.

    Returns:
        One [tokens, hidden] a layer, float32.
    """
    layers = model.model.layers
    count = sum(map(len, documents))
    inputs = [torch.empty(count, model.config.hidden_size) for _ in layers]
    begin = 0

    def keep(kept: Tensor, output: Tensor) -> None:
        kept[begin : begin + output.shape[1]] = output[0]

    hooks = [
        layer.post_attention_layernorm.register_forward_hook(
            lambda _module, _args, output, kept=kept: keep(kept, output)
        )
        for layer, kept in zip(layers, inputs, strict=True)
    ]
    try:
        for done, document in enumerate(documents):
            progress("reading the calibration text", done, len(documents))
            model.model(torch.tensor([document]), use_cache=False)
            begin += len(document)
    finally:
        for hook in hooks:
            hook.remove()
    progress("reading the calibration text", len(documents), len(documents))
    return inputs


def router_rows(
    inputs: Tensor, experts: int, *, popularity: float, rng: np.random.Generator
) -> Tensor:
    """Return a router whose experts each serve a cluster of the inputs, some more than others.

    The rows are centroids of the inputs without their mean direction, which all tokens share,
    scaled so that the logits have a standard deviation of 1. An offset of each expert's own along
    the mean makes it more or less popular with every token.

    Args:
        inputs: [tokens, hidden] of a layer's FFN.
        experts: How many.
        popularity: Standard deviation of the offsets, in units of logits at the mean input.
        rng: For the start of the clustering and for the offsets.

    Returns:
        [experts, hidden], float32.
    """
    mean = inputs.mean(dim=0)
    direction = normalize(mean, dim=0)
    centred = inputs - torch.outer(inputs @ direction, direction)
    centroids = spherical_kmeans(centred, experts, rng=rng)
    rows = centroids / (centred @ centroids.T).std()
    offsets = torch.from_numpy(popularity * rng.standard_normal(experts)).to(rows.dtype)
    return rows + torch.outer(offsets, direction / mean.norm())


def spherical_kmeans(points: Tensor, count: int, *, rng: np.random.Generator) -> Tensor:
    """Cluster points by direction.

    Args:
        points: [n, hidden]; n at least ``count``.
        count: Clusters.
        rng: Chooses the points to start from.

    Returns:
        Centroids of length 1, [count, hidden].
    """
    points = normalize(points, dim=1)
    start = rng.choice(len(points), size=count, replace=False)
    centroids = points[torch.from_numpy(start)]
    for _ in range(_ITERATIONS):
        likeness, nearest = (points @ centroids.T).max(dim=1)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, points)
        empty = (torch.bincount(nearest, minlength=count) == 0).nonzero().flatten()
        # A cluster that lost its last point starts again from one that is served worst.
        sums[empty] = points[likeness.argsort(stable=True)[: len(empty)]]
        centroids = normalize(sums, dim=1)
    return centroids
