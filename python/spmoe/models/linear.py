"""Linear layers over a few tokens on a CPU, as the matrix product that is faster there.

torch has one kernel for one row and another for many, and what lies between may run at a fifth of
the memory's speed: decoding with a draft lives there. Written as ``weight @ rows.T`` the same
product can be several times as fast, or not: it is measured on the weights themselves as a model
is loaded. `bench/python/linear_rows.py` prints the difference.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

MOST_ROWS = 9  # products of more are left to torch

_MEASURED_ROWS = (1, 2, 5, MOST_ROWS)  # what lies between follows the next larger one
_MODULES = 8  # of one shape that are measured in turn
_REPEATS = 2
_CLEARLY = 0.85  # of the usual time, from which another product is taken

Shape = tuple[torch.Size, torch.dtype]
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # weight, rows

# Once in a process: the same weights give the same bits however often they are loaded.
_turned_rows: dict[Shape, frozenset[int]] = {}


class FewRowsLinear(nn.Linear):
    """An `nn.Linear` over another's weights that turns the product for some row counts.

    Args:
        linear: Its weight and bias are used, not copied.
        turned_rows: Row counts at which to turn it.
    """

    def __init__(self, linear: nn.Linear, turned_rows: frozenset[int]) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.turned_rows = turned_rows
        self.train(linear.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        """Return [..., out] for [..., in]."""
        # In two dimensions: over a slice of odd strides torch would copy the whole weight.
        rows = input.reshape(-1, self.in_features)
        if len(rows) in self.turned_rows:
            out = turned_product(self.weight, rows)
            out = out if self.bias is None else out + self.bias
        else:
            out = functional.linear(rows, self.weight, self.bias)
        return out.reshape(*input.shape[:-1], self.out_features)


def usual_product(weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return ``rows @ weight.T`` as torch's linear layer computes it. As `turned_product`."""
    return functional.linear(rows, weight)


def turned_product(weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return ``rows @ weight.T`` through ``weight @ rows.T``.

    Args:
        weight: [out, in].
        rows: [rows, in]; one alone is joined by a row of zeros, for one has a kernel of its own.
    """
    columns = functional.pad(rows, (0, 0, 0, 1)) if len(rows) == 1 else rows
    return (weight @ columns.T).T[: len(rows)].contiguous()


def pass_seconds(product: Product, weights: Sequence[torch.Tensor], rows: torch.Tensor) -> float:
    """Return seconds of the product of ``rows`` with each of ``weights`` in turn."""
    start = time.perf_counter()
    for weight in weights:
        product(weight, rows)
    return time.perf_counter() - start


def quicken(model: nn.Module) -> None:
    """Exchange the linear layers of a model on the CPU for ones that suit a few tokens."""
    places: dict[Shape, list[tuple[nn.Module, str, nn.Linear]]] = defaultdict(list)
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child.weight.device.type == "cpu":
                places[child.weight.shape, child.weight.dtype].append((parent, name, child))
    for shape, found in places.items():
        if shape not in _turned_rows:
            weights = [child.weight for _, _, child in found[:_MODULES]]
            with torch.inference_mode():
                _turned_rows[shape] = _measure(weights)
        for parent, name, child in found:
            setattr(parent, name, FewRowsLinear(child, _turned_rows[shape]))


def _measure(weights: Sequence[torch.Tensor]) -> frozenset[int]:
    """Return the row counts at which the turned product is faster for these weights."""
    turned: set[int] = set()
    for fewer, count in zip((0, *_MEASURED_ROWS), _MEASURED_ROWS, strict=False):
        rows = torch.ones(count, weights[0].shape[1], dtype=weights[0].dtype)
        usual_s, turned_s = (
            min(pass_seconds(product, weights, rows) for _ in range(_REPEATS))
            for product in (usual_product, turned_product)
        )
        if turned_s < _CLEARLY * usual_s:
            turned.update(range(fewer + 1, count + 1))
    return frozenset(turned)
