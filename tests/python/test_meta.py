"""Passes and predictions of every family on torch's "meta" device, as a GPU would see them.

A tensor there has no values. An operation that asks for one, a hidden synchronisation on a GPU,
raises, and so does an operation on a tensor that was left on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from families import ALL_FAMILIES, make_checkpoint, make_dense_draft
from spmoe.models.cache_support import cache_support
from spmoe.models.cached import CachedCausalLM
from spmoe.models.experts import ExpertStore, attach
from spmoe.models.loading import TargetModel, load_draft, load_target
from spmoe.prediction.predictor import draft_predictions, target_predictions
from spmoe.prediction.routers import routers

META = torch.device("meta")
PROMPT = list(range(40))  # past the sliding windows of the families


@dataclass
class MetaRuntime:
    """A `Runtime` as far as shapes and devices go."""

    store: ExpertStore
    layers: list[int] = field(default_factory=list)  # that ran
    predicted: list[int] = field(default_factory=list)

    def forward(
        self, layer: int, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        assert x.shape[1:] == (self.store.hidden,)
        assert index.shape == weights.shape
        assert index.shape[0] == x.shape[0]
        assert {x.device, index.device, weights.device} == {META}
        self.layers.append(layer)
        return torch.empty_like(x)

    def predict(self, layer: int, scores: torch.Tensor) -> None:
        assert scores.shape == (self.store.expert_count,)
        assert scores.device == META
        self.predicted.append(layer)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A dense model of the targets' depth and width."""
    path = make_dense_draft(tmp_path_factory.mktemp("dense"), num_hidden_layers=3)
    return load_draft(path)


# A family of each kind: plain, latent attention, sinks and biases, a biased router, recurrent.
SOON = ("mixtral", "deepseek_v3", "gpt_oss", "minimax_m2", "qwen3_next")


@pytest.fixture(
    params=[
        pytest.param(family, marks=[] if family in SOON else pytest.mark.slow)
        for family in sorted(ALL_FAMILIES)
    ]
)
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TargetModel]:
    path = make_checkpoint(request.param, tmp_path, with_tokenizer=False)
    loaded = load_target(path)
    yield loaded
    loaded.store.close()


def on_meta(model: Any) -> CachedCausalLM:
    """Move a model and return a reader of it; its cache is tried out before, on the host."""
    support = cache_support(model)
    for tensor in (*model.parameters(), *model.buffers()):
        torch.utils.swap_tensors(tensor, tensor.to(META))  # routers hold some of them
    return CachedCausalLM(model, support)


def test_passes_and_predictions_ask_for_no_value(target: TargetModel, draft: Any) -> None:
    runtime: Any = MetaRuntime(target.store)
    routers(target)  # which are found once, by passes of their own
    target_reader, draft_reader = on_meta(target.model), on_meta(draft)
    attach(target, runtime)
    layers = list(range(target.store.layer_count))
    with (
        draft_predictions(target, draft, runtime.predict),
        target_predictions(target, runtime.predict),
    ):
        assert target_reader.read(PROMPT).device == META
        draft_reader.read(PROMPT)
        assert runtime.predicted == layers  # by the draft alone: prompts need nearly every expert
        runtime.layers.clear()
        runtime.predicted.clear()
        logits = target_reader.read([1, 2, 3, 4, 5], last=5)
        assert logits.shape == (5, target.model.config.get_text_config().vocab_size)
        assert set(runtime.layers) == set(layers)
        assert set(runtime.predicted) == set(layers[1:])
        if target_reader.can_rewind:
            target_reader.rewind(len(PROMPT) + 2)
        target_reader.read([3])
        runtime.predicted.clear()
        draft_reader.read([1])
        assert runtime.predicted == layers


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x + torch.ones(x.shape[-1]),
        lambda x: x[x > 0],
    ],
    ids=["item", "tolist", "cpu", "of-the-host", "mask"],
)
def test_what_would_synchronise_or_mix_devices_raises(
    draft: Any, fault: Callable[[torch.Tensor], Any]
) -> None:
    reader = on_meta(draft)
    layer = draft.model.layers[1]
    hook = layer.register_forward_pre_hook(lambda _, inputs: fault(inputs[0]) and None)
    try:
        with pytest.raises((RuntimeError, NotImplementedError)):
            reader.read(PROMPT)
    finally:
        hook.remove()
