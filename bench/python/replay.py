"""Driving a `Runtime` by scripted routing: seconds and bytes of iterations without a model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from scripted import Experts, Request, ScriptedIteration
from spmoe.bench.cell import shares
from spmoe.costs.costs import Costs
from spmoe.decoding.planner import Planner
from spmoe.decoding.prior import Shape
from spmoe.decoding.speculative import Iteration
from spmoe.prediction.predictor import join
from spmoe.reporting.counters import Counters
from spmoe.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Pace:
    """Work that is not there, slept instead.

    Attributes:
        draft_s: A draft step. Its predictions are reported when half of it has passed.
        dense_s: What the target does in a layer beside its routed experts.
    """

    draft_s: float = 0.0
    dense_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Tensors:
    """The dtype and the device of activations."""

    dtype: torch.dtype
    device: torch.device

    def ones(self, *shape: int) -> torch.Tensor:
        """Return a tensor of that shape."""
        return torch.ones(shape, dtype=self.dtype, device=self.device)

    def wait(self) -> None:
        """Wait until everything that was begun has been computed."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Replay:
    """Runs scripted requests through a runtime, as `spmoe.Engine` would run texts.

    Args:
        runtime: Over a store of the script's layers and experts.
        experts_per_token: The model's top-k.
        costs: Of this machine; a planner sets each iteration's limits from them.
        pace: Of draft and dense part.
        tensors: Of activations.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        experts_per_token: int,
        costs: Costs,
        pace: Pace,
        tensors: Tensors,
    ) -> None:
        self.runtime = runtime
        self.pace = pace
        self.tensors = tensors
        store = runtime.store
        shape = Shape(
            layers=store.layer_count,
            experts=store.expert_count,
            experts_per_token=experts_per_token,
            memory_bytes=runtime.expert_memory_bytes,
        )
        self.planner = Planner(costs, shape, policy=runtime.traits)

    def run(self, request: Request) -> list[float]:
        """Run one request; return the seconds of each iteration."""
        self.runtime.begin_request()
        return [self._iterate(iteration) for iteration in request]

    def _iterate(self, iteration: ScriptedIteration) -> float:
        runtime, planner = self.runtime, self.planner
        before = runtime.counters()
        plan = planner.plan((iteration.drafted,))
        runtime.set_limits(
            cutoff_layer=plan.cutoff_layer,
            budget_bytes=plan.budget_bytes,
            break_even=plan.break_even,
        )
        wanted_layers = [
            plan.uses_prediction(runtime.traits, layer)
            for layer in range(runtime.store.layer_count)
        ]
        sources = runtime.traits.reads
        start = time.perf_counter()
        for row in range(iteration.drafted):
            time.sleep(self.pace.draft_s / 2)
            if "draft" in sources:
                for layer, wanted in enumerate(wanted_layers):
                    if wanted:
                        scores = self._scores(iteration.by_draft[row : row + 1, layer])
                        runtime.predict(layer, scores, source="draft")
            time.sleep(self.pace.draft_s / 2)
        drafted = time.perf_counter()
        first_row = iteration.drafted if "draft" in sources else 0
        self._verify(iteration, wanted_layers if "target" in sources else [], first_row)
        verified = time.perf_counter()
        runtime.end_iteration(iteration.accepted)
        used = runtime.counters() - before
        draft_s = drafted - start
        passes = (draft_s / iteration.drafted,) * iteration.drafted if iteration.drafted else ()
        took = Iteration(
            tokens=[0] * (iteration.accepted + 1),
            logits=torch.empty(0),
            drafted=iteration.drafted,
            pass_s=passes,
            draft_s=draft_s,
            verify_s=verified - drafted,
            end_s=verified,
        )
        planner.observe(replace(plan, read_last=False), took, used)  # no draft reads anything
        return verified - start

    def _verify(
        self, iteration: ScriptedIteration, wanted_layers: Sequence[bool], first_row: int
    ) -> None:
        rows, layers, k = iteration.experts.shape
        x = self.tensors.ones(rows, self.runtime.store.hidden)
        weights = self.tensors.ones(rows, k) / k
        index = torch.from_numpy(iteration.experts).to(self.tensors.device)
        for layer in range(layers):
            time.sleep(self.pace.dense_s)
            if layer + 1 < layers and any(wanted_layers[layer + 1 : layer + 2]):
                scores = self._scores(iteration.by_target[first_row:, layer + 1])
                self.runtime.predict(layer + 1, scores, source="target")
            self.runtime.forward(layer, x, index[:, layer], weights)
        self.tensors.wait()  # as for the logits

    def _scores(self, experts: Experts) -> torch.Tensor:
        """Return scores [experts of a layer] for some rows [rows, k], as `Runtime.predict` wants.

        A row's probability is shared by the experts that it selects.
        """
        rows, k = experts.shape
        scores = torch.zeros(rows, self.runtime.store.expert_count)
        scores.scatter_(1, torch.from_numpy(experts), 1 + 1 / k)
        return join(scores).to(self.tensors.device)


def access_all(runtime: Runtime, tensors: Tensors) -> Counters:
    """Access every expert once, layer by layer; return how much the counters grew."""
    store = runtime.store
    x, weights = tensors.ones(store.expert_count, store.hidden), tensors.ones(store.expert_count, 1)
    index = torch.arange(store.expert_count, device=tensors.device)[:, None]
    with runtime.counting() as used:
        for layer in range(store.layer_count):
            runtime.forward(layer, x, index, weights)
        tensors.wait()
        runtime.end_iteration()  # all of them are there, and counted
    return used


def to_row(
    seconds: Sequence[float],
    script: Sequence[Request],
    used: Counters,
    *,
    peak_gbps: float,
) -> dict[str, Any]:
    """Return the figures of a run.

    Args:
        seconds: Of each iteration.
        script: What was run.
        used: How much the counters grew.
        peak_gbps: Of the link.
    """
    iterations = [iteration for request in script for iteration in request]
    tokens = sum(iteration.accepted + 1 for iteration in iterations)
    total_s = float(np.sum(seconds))
    return {
        "iterations": len(iterations),
        "tokens": tokens,
        "iteration_s": {
            "mean": total_s / len(iterations),
            "p50": float(np.percentile(seconds, 50)),
            "p90": float(np.percentile(seconds, 90)),
        },
        "tpot_s": total_s / tokens,
        **shares(used),
        "bytes_per_token": used.link_bytes / tokens,
        "link_share": used.link_bytes / (peak_gbps * 1e9 * total_s) if peak_gbps else None,
        "stall_share": used.stall_s / total_s,
        "compute_share": used.compute_s / total_s,
    }
