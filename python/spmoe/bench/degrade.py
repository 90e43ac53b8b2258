"""Predictions made worse on purpose: those of the built-in pair hide what bad ones cost."""

from __future__ import annotations

import random
from typing import Any

import torch

from spmoe.runtime import Runtime


def exchange(scores: torch.Tensor, share: float, generator: random.Random) -> torch.Tensor:
    """Return scores in which some of the predicted experts have changed places with random ones.

    Args:
        scores: [experts], as `spmoe.prediction.predictor.join`.
        share: How likely each predicted expert is exchanged, with any of the layer or itself.
        generator: Draws both.
    """
    values = scores.detach().to("cpu", copy=True)
    for expert in range(len(values)):
        if values[expert] > 1 and generator.random() < share:
            other = generator.randrange(len(values))
            values[[expert, other]] = values[[other, expert]]
    return values


def degrade(runtime: Runtime, share: float) -> None:
    """Exchange a share of the experts that are predicted to a runtime, seeded."""
    generator = random.Random(0)
    predict = runtime.predict

    def degraded(layer: int, scores: torch.Tensor, **options: Any) -> None:
        predict(layer, exchange(scores, share, generator), **options)

    runtime.predict = degraded  # type: ignore[assignment, method-assign]
