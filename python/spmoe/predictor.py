"""Which experts the target will choose, told ahead of time by what is being computed anyway.

While the draft writes a token, the state of each of its layers goes through the *target's* router
of the same layer, and the scores go to the runtime, layer by layer. Inside the target, the state
of a layer goes through the routers of the next ones.

Predictions change when bytes move, never the text.

Source: SP-MoE, arXiv:2510.10302, section 3.1; AdapMoE, arXiv:2408.10284, for the target's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from spmoe.errors import InvalidArgument

# What of a layer is shown to the router, and whether the target's own norm is in between.
STATES = ("residual", "mlp-input", "attention")

MAX_ROWS = 32  # a pass of more tokens is a prompt, which needs nearly every expert

# Policy -> the models whose states it predicts from.
SOURCES: dict[str, tuple[str, ...]] = {
    "next-gate": ("target",),
    "sp-moe": ("draft",),
    "horizon": ("draft", "target"),
}

Report = Callable[[int, torch.Tensor], None]  # MoE layer, scores [experts]


class HasMoeLayers(Protocol):
    """A `TargetModel`."""

    @property
    def model(self) -> Any:
        """The transformers model."""
        ...

    @property
    def moe_layers(self) -> Sequence[Any]:
        """Layers with routed experts, in order: each has ``number`` and ``gate``."""
        ...


@dataclass(frozen=True, slots=True)
class Router:
    """What the target does between attention and experts in one MoE layer."""

    norm: Any
    gate: Any

    def scores(self, state: torch.Tensor, *, normed: bool) -> torch.Tensor:
        """Return what the router thinks of some tokens, summed over them.

        Args:
            state: [tokens, hidden], the residual stream, or what a norm made of it.
            normed: The state needs no norm any more.

        Returns:
            [experts], float32: router probabilities, and 1 more for each token that selects the
            expert.
        """
        state = state.to(self.norm.weight.dtype)
        # Forward of the class: calling the module would fire the hooks that others put on it.
        if not normed:
            state = type(self.norm).forward(self.norm, state)
        logits, _, index = type(self.gate).forward(self.gate, state)
        scores = logits.detach().float().softmax(dim=-1)
        joined: torch.Tensor = scores.scatter_add(1, index, torch.ones_like(scores)).sum(dim=0)
        return joined


def routers(target: HasMoeLayers) -> list[Router]:
    """Return the target's routers, one for each MoE layer.

    Raises:
        InvalidArgument: A layer has no norm or gate under the names that transformers uses.
    """
    found = []
    for layer in target.moe_layers:
        norm = getattr(_block(target.model, layer), "post_attention_layernorm", None)
        if norm is None or layer.gate is None:
            raise InvalidArgument(
                f"layer {layer.number} of {type(target.model).__name__} has no "
                "post_attention_layernorm or no gate, so its experts cannot be predicted; use "
                'policy="on-demand"'
            )
        found.append(Router(norm, layer.gate))
    return found


def draft_mismatch(target: HasMoeLayers, draft: Any) -> str | None:
    """Return why the draft's layers do not stand for the target's, None if they do."""
    ours, theirs = (model.config.get_text_config() for model in (target.model, draft))
    for what, name in (("layers", "num_hidden_layers"), ("hidden size", "hidden_size")):
        wanted, found = getattr(ours, name), getattr(theirs, name)
        if wanted != found:
            return f"the draft has {what} {found}, the target {wanted}"
    return None


@contextmanager
def draft_predictions(
    target: HasMoeLayers, draft: Any, report: Report, *, state: str = STATES[0]
) -> Iterator[None]:
    """Report predictions for the target while ``draft`` runs, of the last token that it reads.

    Args:
        target: The model whose experts are predicted.
        draft: A transformers model with as many layers and the same hidden size.
        report: Called with a MoE layer and its scores, in the order of layers.
        state: "residual" (the stream after attention, through the target's norm), "mlp-input"
            (after the draft's own norm) or "attention" (attention's output alone).

    Raises:
        InvalidArgument: The models differ in depth or width, or the state is not one of these.
    """
    if state not in STATES:
        raise InvalidArgument(f'state "{state}" is not one of {", ".join(STATES)}')
    if mismatch := draft_mismatch(target, draft):
        raise InvalidArgument(f"{mismatch}: its layers cannot stand for the target's")
    with ExitStack() as hooks:
        pairs = zip(target.moe_layers, routers(target), strict=True)
        for ordinal, (layer, router) in enumerate(pairs):
            block: Any = _block(draft, layer)

            def tell(
                captured: torch.Tensor, ordinal: int = ordinal, router: Router = router
            ) -> None:
                last = captured[0, -1:]  # [1, hidden]
                report(ordinal, router.scores(last, normed=state != "residual"))

            module = block.self_attn if state == "attention" else block.post_attention_layernorm
            _capture(hooks, module, tell, before=state == "residual")
        yield


@contextmanager
def target_predictions(
    target: HasMoeLayers,
    report: Report,
    *,
    ahead: int = 1,
    first_row: Callable[[], int] = lambda: 0,
) -> Iterator[None]:
    """Report predictions for the next layers while the target runs a few tokens.

    Args:
        target: The model; passes of more than `MAX_ROWS` tokens (prompts) are left alone.
        report: Called with a MoE layer and its scores.
        ahead: How many layers ahead, from 1 to 3.
        first_row: Called in each layer: rows before it are left out.
    """
    found = routers(target)
    with ExitStack() as hooks:
        for ordinal, layer in enumerate(target.moe_layers):
            nexts = range(ordinal + 1, min(ordinal + 1 + ahead, len(found)))

            def tell(captured: torch.Tensor, nexts: range = nexts) -> None:
                rows = captured[0]  # [tokens, hidden]
                if len(rows) > MAX_ROWS or first_row() >= len(rows):
                    return
                for later in nexts:
                    report(later, found[later].scores(rows[first_row() :], normed=False))

            block: Any = _block(target.model, layer)
            _capture(hooks, block.post_attention_layernorm, tell, before=True)
        yield


def _block(model: nn.Module, layer: Any) -> nn.Module:
    """Return the decoder layer of ``model`` at the place of the target's MoE layer."""
    parts = layer.path.split(".")
    return model.get_submodule(".".join(parts[: parts.index(str(layer.number)) + 1]))


def _capture(
    hooks: ExitStack, module: nn.Module, tell: Callable[[torch.Tensor], None], *, before: bool
) -> None:
    def before_hook(_module: nn.Module, inputs: Any) -> None:
        tell(inputs[0].detach())

    def after_hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        tell((output[0] if isinstance(output, tuple) else output).detach())

    if before:
        hooks.callback(module.register_forward_pre_hook(before_hook).remove)
    else:
        hooks.callback(module.register_forward_hook(after_hook).remove)
