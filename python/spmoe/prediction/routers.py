"""The target's routers, callable on any state: found by watching one pass of the model.

Families name the norm before their experts differently, and some routers take more than the
hidden states (a correction bias). Both are read off a real pass and not assumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from spmoe.errors import Error, InvalidArgument
from spmoe.models.experts import without_contribution
from spmoe.models.loading import TargetModel
from spmoe.policies import SOURCES, instead
from spmoe.prediction.states import decoder_layers, read_text


@dataclass(frozen=True, slots=True)
class Router:
    """Norm and router of the target between attention and experts in one MoE layer.

    Attributes:
        norm: The module whose output the MoE block reads; its input is the residual stream.
        gate: The router.
        batched: The router takes states [1, tokens, hidden], not [tokens, hidden].
        arguments: What else it takes, by position.
        keywords: What else it takes, by name.
    """

    norm: Any
    gate: Any
    batched: bool = False
    arguments: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] | None = None

    def scores(self, state: torch.Tensor, *, normed: bool) -> torch.Tensor:
        """Return the router's scores of some tokens.

        Args:
            state: [tokens, hidden], the residual stream, or what a norm made of it.
            normed: The state needs no norm any more.

        Returns:
            [tokens, experts], float32: router probabilities, and 1 more for each expert that the
            token selects.
        """
        state = state.to(self.norm.weight.dtype)
        # Forward of the class: calling the module would fire the hooks of others.
        if not normed:
            state = type(self.norm).forward(self.norm, state)
        logits, _, index = type(self.gate).forward(
            self.gate,
            state[None] if self.batched else state,
            *self.arguments,
            **(self.keywords or {}),
        )
        scores: torch.Tensor = logits.detach().float().softmax(dim=-1)
        return scores.scatter_add(1, index, torch.ones_like(scores))


_FOUND: WeakKeyDictionary[Any, list[Router]] = WeakKeyDictionary()  # by model


def routers(target: TargetModel) -> list[Router]:
    """Return the target's routers, one for each MoE layer. The first call runs the model.

    It reads a few tokens, with routed experts that are not in memory left out: none is fetched.

    Raises:
        InvalidArgument: The router of a layer cannot be called on states of another model: the
            layer has no gate or no norm before it, or the router takes what changes by the pass.
    """
    known = _FOUND.get(target.model)
    gates = [layer.gate for layer in target.moe_layers]
    if known is None or [router.gate for router in known] != gates:
        known = _FOUND[target.model] = _find(target)
    return known


def _find(target: TargetModel) -> list[Router]:
    found = []
    with without_contribution(target.model):
        passes = [_watch_pass(target, tokens) for tokens in ((5, 3), (2, 7, 1))]
    for layer, first, second in zip(target.moe_layers, *passes, strict=True):
        name = f"layer {layer.number} of {type(target.model).__name__}"
        if first.norm is None or not first.called:
            raise InvalidArgument(
                f"{name} has no norm before its experts or no gate, so its experts cannot be "
                f"predicted; {instead(*SOURCES)}"
            )
        if not (_same(first.arguments, second.arguments) and first.keywords == second.keywords):
            raise InvalidArgument(
                f"the router of {name} takes arguments that change by the pass, so its experts "
                f"cannot be predicted; {instead(*SOURCES)}"
            )
        router = Router(first.norm, layer.gate, first.batched, first.arguments, first.keywords)
        _try(router, target, name)
        found.append(router)
    return found


@dataclass(slots=True)
class _Seen:
    """Observations of one pass in one MoE layer."""

    norm: nn.Module | None = None
    called: bool = False
    batched: bool = False
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] | None = None


def _watch_pass(target: TargetModel, tokens: Sequence[int]) -> list[_Seen]:
    seen = [_Seen() for _ in target.moe_layers]
    blocks = decoder_layers(target.model)
    with ExitStack() as hooks:
        for layer, into in zip(target.moe_layers, seen, strict=True):
            # The tensors stay alive while the pass lasts, so that no other takes their identity.
            made: dict[int, tuple[torch.Tensor, nn.Module]] = {}

            def note_output(
                module: nn.Module,
                _inputs: Any,
                output: Any,
                made: dict[int, tuple[torch.Tensor, nn.Module]] = made,
            ) -> None:
                if isinstance(output, torch.Tensor):
                    made.setdefault(id(output), (output, module))

            def note_block(
                _module: nn.Module,
                inputs: Any,
                into: _Seen = into,
                made: dict[int, tuple[torch.Tensor, nn.Module]] = made,
            ) -> None:
                made_by = made.get(id(inputs[0])) if inputs else None
                into.norm = made_by[1] if made_by is not None else None

            def note_gate(
                _module: nn.Module, inputs: Any, keywords: dict[str, Any], into: _Seen = into
            ) -> None:
                into.called, into.batched = True, inputs[0].ndim == 3
                into.arguments, into.keywords = tuple(inputs[1:]), keywords

            block = target.model.get_submodule(layer.path.rpartition(".")[0])
            for module in blocks[layer.number].modules():
                hooks.callback(module.register_forward_hook(note_output).remove)
            hooks.callback(block.register_forward_pre_hook(note_block).remove)
            if layer.gate is not None:
                hook = layer.gate.register_forward_pre_hook(note_gate, with_kwargs=True)
                hooks.callback(hook.remove)
        read_text(target.model, tokens)
    return seen


def _same(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    return len(first) == len(second) and all(
        ours is theirs for ours, theirs in zip(first, second, strict=True)
    )


def _try(router: Router, target: TargetModel, name: str) -> None:
    """Call a router once, so that a prediction does not fail later."""
    weight = router.norm.weight
    try:
        scores = router.scores(torch.ones(2, weight.shape[-1], device=weight.device), normed=False)
    except Error:
        raise
    except Exception as error:  # whatever the model's code raises
        raise InvalidArgument(
            f"the router of {name} cannot be called for predictions ({type(error).__name__}: "
            f"{error}); {instead(*SOURCES)}"
        ) from error
    if scores.shape != (2, target.store.expert_count):
        raise InvalidArgument(
            f"the router of {name} gives scores {list(scores.shape)} for 2 tokens and "
            f"{target.store.expert_count} experts; {instead(*SOURCES)}"
        )
