"""Which of the activations that the runtime computes a model's experts use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from spmoe.errors import InvalidArgument

_Formula = Callable[[torch.Tensor, torch.Tensor, float, float], torch.Tensor]


def _clamped_swiglu(
    gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float
) -> torch.Tensor:
    gate = gate.clamp(max=limit)
    return (up.clamp(-limit, limit) + 1) * gate * torch.sigmoid(alpha * gate)


# The names and formulas of the native runtime.
_FORMULAS: dict[str, _Formula] = {
    "silu": lambda gate, up, _alpha, _limit: functional.silu(gate) * up,
    "gelu": lambda gate, up, _alpha, _limit: functional.gelu(gate) * up,
    "gelu_tanh": lambda gate, up, _alpha, _limit: functional.gelu(gate, approximate="tanh") * up,
    "clamped_swiglu": _clamped_swiglu,
}


@dataclass(frozen=True, slots=True)
class Activation:
    """How gate and up join; ``alpha`` and ``limit`` matter to "clamped_swiglu" alone."""

    name: str
    alpha: float
    limit: float


def recognise(experts: Any, *, interleaved: bool) -> Activation:
    """Return the activation of an experts module by running its own code on a grid of numbers.

    The name in the model's configuration is not read: a family may override the code.

    Args:
        experts: Experts module of a transformers model.
        interleaved: Gate and up alternate in the last dimension; else gate comes first.

    Raises:
        InvalidArgument: No formula of ours gives the numbers of the module's.
    """
    # Far enough out to meet a clamp, close enough together to separate gelu from its approximation.
    line = torch.cat([torch.linspace(-30, 30, 121), torch.tensor([-1e4, -100.0, 100.0, 1e4])])
    gate, up = torch.cartesian_prod(line.double(), line.double()).unbind(-1)
    joined = torch.stack([gate, up], -1).flatten() if interleaved else torch.cat([gate, up])
    with torch.no_grad():
        found = experts._apply_gate(joined[None])[0]  # noqa: SLF001
    alpha = float(getattr(experts, "alpha", 1.702))
    limit = float(getattr(experts, "limit", 7.0))
    for name, formula in _FORMULAS.items():
        if torch.allclose(found, formula(gate, up, alpha, limit), rtol=1e-6, atol=1e-8):
            return Activation(name, alpha, limit)
    raise InvalidArgument(
        f"{type(experts).__name__} join gate and up in a way that spmoe does not compute (it "
        f"computes {', '.join(_FORMULAS)}); use transformers for this model"
    )
