"""The routed experts inside a transformers model: finding, emptying and replacing them.

transformers calls experts through an interface, ``ALL_EXPERTS_FUNCTIONS``; importing this module
registers the implementation "spmoe", which hands each call to a `Runtime`.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from spmoe._core import ExpertStore as ExpertStore  # noqa: PLC0414
from spmoe.errors import InvalidArgument
from spmoe.models.activation import Activation, recognise
from spmoe.runtime import Runtime

IMPLEMENTATION = "spmoe"

_PLACE = "_spmoe_place"  # attribute of an experts module: its runtime and ordinal
_UNSUPPORTED = (
    ("has_gate", True, "no gate"),
    ("has_post_expert_norm", False, "a norm behind them"),
)


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """One layer with routed experts.

    Attributes:
        number: Layer number in the model and in its tensors' names.
        path: Name of the experts module.
        experts: It; its weights are empty tensors on "meta".
        gate: The layer's router; None if it goes by an unusual name.
    """

    number: int
    path: str
    experts: nn.Module
    gate: nn.Module | None


@dataclass(frozen=True, slots=True)
class ExpertFormat:
    """The format of experts by the model's code; the same in every layer.

    Attributes:
        shape: Experts of a layer, hidden size, inner size.
        interleaved: Gate and up alternate in the fused tensor.
        activation: What joins gate and up.
    """

    shape: tuple[int, int, int]
    interleaved: bool
    activation: Activation


class HasMoeLayers(Protocol):
    """A `TargetModel`, for `attach`."""

    @property
    def moe_layers(self) -> Sequence[MoeLayer]:
        """In the order of the forward pass."""
        ...


@contextlib.contextmanager
def without_experts(config: PreTrainedConfig) -> Iterator[None]:
    """Make models of ``config`` that are built inside hold no memory for routed experts.

    An expert weight becomes a plain attribute on "meta": transformers' initialisation still finds
    it, its loading does not. One thread: classes are changed while it lasts.
    """
    modules = {
        importlib.import_module(type(part).__module__.replace("configuration_", "modeling_"))
        for part in (config, config.get_text_config())
    }
    originals: list[tuple[Any, Callable[..., None]]] = [
        (cls, cls.__init__)
        for module in modules
        for cls in vars(module).values()
        if isinstance(cls, type)
        and issubclass(cls, nn.Module)
        and hasattr(cls, "_apply_gate")
        and cls.__module__ == module.__name__
    ]
    for cls, original in originals:
        cls.__init__ = _emptied(original)
    try:
        yield
    finally:
        for cls, original in originals:
            cls.__init__ = original


def _emptied(original: Callable[..., None]) -> Callable[..., None]:
    def build(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        with torch.device("meta"):
            original(self, *args, **kwargs)
        for name in list(self._parameters):
            parameter = self._parameters.pop(name)
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                object.__setattr__(self, name, empty)

    return build


def find_layers(model: nn.Module) -> tuple[MoeLayer, ...]:
    """Return the layers with routed experts, in the order of the forward pass; perhaps none."""
    layers = []
    for path, module in model.named_modules():
        if hasattr(module, "_apply_gate") and hasattr(module, "has_gate"):
            block = model.get_submodule(path.rpartition(".")[0])
            gate = getattr(block, "gate", None) or getattr(block, "router", None)
            number = next(int(part) for part in path.split(".") if part.isdigit())
            layers.append(MoeLayer(number, path, module, gate))
    return tuple(layers)


def describe(layers: Sequence[MoeLayer]) -> ExpertFormat:
    """Return what all of ``layers`` have in common.

    Args:
        layers: At least one, of a model built inside `without_experts`.

    Raises:
        InvalidArgument: The experts are of a kind that spmoe cannot compute, or differ by layer.
    """
    formats = [_describe(layer.experts) for layer in layers]
    for layer, found in zip(layers, formats, strict=True):
        if found != formats[0]:
            raise InvalidArgument(
                f"experts of layer {layer.number} are {found}, those of layer "
                f"{layers[0].number} {formats[0]}: spmoe needs one format; use transformers"
            )
    return formats[0]


def _describe(experts: Any) -> ExpertFormat:
    kind = type(experts).__name__
    for flag, needed, what in _UNSUPPORTED:
        if getattr(experts, flag, needed) != needed:
            raise InvalidArgument(
                f"{kind} have {what}, which spmoe cannot compute; use transformers for this model"
            )
    if any(True for _ in experts.parameters()):
        raise InvalidArgument(
            f"{kind} could not be kept out of memory: their class is not in the modeling module "
            "of the model's configuration; use transformers for this model"
        )
    count, rows, columns = experts.gate_up_proj.shape
    hidden, twice_inter = (rows, columns) if experts.is_transposed else (columns, rows)
    interleaved = not experts.is_concatenated
    return ExpertFormat(
        (count, hidden, twice_inter // 2), interleaved, recognise(experts, interleaved=interleaved)
    )


def forbid_saving(model: PreTrainedModel) -> None:
    """Make ``model.save_pretrained`` refuse: it would write a checkpoint without experts."""

    def save_pretrained(*_: Any, **__: Any) -> None:
        raise InvalidArgument(
            "save_pretrained of a model whose experts are offloaded would write a checkpoint "
            "without them; copy the original checkpoint's directory, or load it with transformers"
        )

    object.__setattr__(model, "save_pretrained", save_pretrained)


class _NoContribution:
    """Stands for a `Runtime` whose experts all give zero."""

    def forward(self, _layer: int, x: torch.Tensor, *_routing: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


@contextlib.contextmanager
def without_contribution(model: nn.Module) -> Iterator[None]:
    """Let routed experts that are not in memory give zero while it lasts, so that none is read."""
    absent = [
        layer.experts
        for layer in find_layers(model)
        if not any(True for _ in layer.experts.parameters())
    ]
    places = [getattr(experts, _PLACE, None) for experts in absent]
    for experts in absent:
        setattr(experts, _PLACE, (_NoContribution(), 0))
    try:
        yield
    finally:
        for experts, place in zip(absent, places, strict=True):
            setattr(experts, _PLACE, place)


def attach(target: HasMoeLayers, runtime: Runtime) -> None:
    """Let ``runtime`` compute the experts of ``target``; replaces one attached before.

    Raises:
        InvalidArgument: The runtime's store has another number of layers.
    """
    if runtime.store.layer_count != len(target.moe_layers):
        raise InvalidArgument(
            f"the runtime holds experts of {runtime.store.layer_count} layers, but the model has "
            f"{len(target.moe_layers)} MoE layers; build the runtime over the target's own store"
        )
    for ordinal, layer in enumerate(target.moe_layers):
        setattr(layer.experts, _PLACE, (runtime, ordinal))


def _forward(
    experts: nn.Module,
    hidden_states: torch.Tensor,  # [tokens, hidden]
    top_k_index: torch.Tensor,  # [tokens, k]
    top_k_weights: torch.Tensor,  # [tokens, k]
) -> torch.Tensor:
    place: tuple[Runtime, int] | None = getattr(experts, _PLACE, None)
    if place is None:
        raise InvalidArgument(
            "this model's experts are offloaded and no runtime is attached to compute them; call "
            "spmoe.models.experts.attach(target, runtime), or use spmoe.load"
        )
    runtime, layer = place
    return runtime.forward(layer, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
