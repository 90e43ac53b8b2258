"""Hooks on running models: the states of their layers, and the target's routing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from spmoe.errors import InvalidArgument
from spmoe.policies import instead

# State of a layer -> the names of the module that it is read at, which differ between families,
# and whether it is that module's input.
# "residual" is the stream after attention, "mlp-input" what the layer's own norm makes of it for
# its MLP or experts, "attention" what attention alone put out.
_PLACES = {
    "residual": (("post_attention_layernorm", "pre_ff_layernorm"), True),
    "mlp-input": (("mlp", "block_sparse_moe", "feed_forward"), True),
    "attention": (("self_attn",), False),
}
STATES = tuple(_PLACES)

Observe = Callable[[torch.Tensor], None]  # the state of every token of a pass, [tokens, hidden]
ObserveRouting = Callable[[torch.Tensor, torch.Tensor], None]  # [tokens, experts], [tokens, k]


def decoder_layers(model: Any) -> Sequence[nn.Module]:
    """Return the decoder layers of a transformers model, in order.

    Raises:
        InvalidArgument: The model keeps them under another name than most.
    """
    layers: Sequence[nn.Module] | None = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        raise InvalidArgument(
            f"{type(model).__name__} has no decoder layers under the name that transformers uses, "
            f"so its states cannot be read; {instead('draft')}"
        )
    return layers


def read_text(model: Any, tokens: Sequence[int]) -> None:
    """Let the layers of a transformers model read a text in one pass, for those who watch them."""
    with torch.no_grad():
        model.get_decoder()(
            input_ids=torch.tensor([list(tokens)], device=model.device), use_cache=False
        )


def check_state(state: str) -> None:
    """Raise InvalidArgument unless ``state`` is one of `STATES`."""
    if state not in STATES:
        raise InvalidArgument(f'state "{state}" is not one of {", ".join(STATES)}')


def watch_state(hooks: ExitStack, layer: nn.Module, state: str, observe: Observe) -> None:
    """Call ``observe`` with a decoder layer's state at each pass, until ``hooks`` close.

    Args:
        hooks: Owns what is put on the layer.
        layer: Of `decoder_layers`.
        state: One of `STATES`.
        observe: Gets the state detached, of the first sequence of the batch.

    Raises:
        InvalidArgument: The layer has no such part under the name that transformers uses.
    """
    names, before = _PLACES[state]
    found = [part for name in names if (part := getattr(layer, name, None)) is not None]
    if not found:
        raise InvalidArgument(
            f'{type(layer).__name__} has no {" or ".join(names)}, so its state "{state}" cannot be '
            f"read; {instead('draft')}"
        )

    module: nn.Module = found[0]
    if before:
        watch_input(hooks, module, observe)
        return

    def after_hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        observe((output[0] if isinstance(output, tuple) else output).detach()[0])

    hooks.callback(module.register_forward_hook(after_hook).remove)


def watch_input(hooks: ExitStack, module: nn.Module, observe: Observe) -> None:
    """Call ``observe`` with the first input of a module at each pass. As `watch_state`."""

    def before_hook(_module: nn.Module, inputs: Any) -> None:
        observe(inputs[0].detach()[0])

    hooks.callback(module.register_forward_pre_hook(before_hook).remove)


def watch_routing(hooks: ExitStack, gate: nn.Module, observe: ObserveRouting) -> None:
    """Call ``observe`` with a router's logits and choices at each pass, until ``hooks`` close.

    Args:
        hooks: Owns what is put on the router.
        gate: Of a MoE layer.
        observe: Gets logits [tokens, experts] and indices [tokens, k].
    """

    def after_hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        logits, _, index = output
        observe(logits.detach(), index.detach())

    hooks.callback(gate.register_forward_hook(after_hook).remove)
