"""Linear layers that suit a few tokens: the same product, and torch's own where that is faster."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from spmoe.models import linear
from spmoe.models.linear import MOST_ROWS, FewRowsLinear, quicken, turned_product

ROWS = (1, 2, 3, 8, MOST_ROWS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
def test_the_turned_product_is_the_same_one(rows: int, dtype: torch.dtype) -> None:
    weight, x = torch.randn(24, 16).to(dtype), torch.randn(rows, 16).to(dtype)
    found = turned_product(weight, x)
    assert found.is_contiguous()
    torch.testing.assert_close(found, functional.linear(x, weight))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("turned", [frozenset[int](), frozenset(ROWS)])
@pytest.mark.parametrize("rows", ROWS)
def test_a_layer_computes_what_the_one_it_replaces_did(
    rows: int, turned: frozenset[int], bias: bool
) -> None:
    replaced = nn.Linear(16, 24, bias=bias)
    layer = FewRowsLinear(replaced, turned)
    assert layer.weight is replaced.weight
    x = torch.randn(1, rows, 16)
    torch.testing.assert_close(layer(x), replaced(x))


def test_a_slice_of_a_longer_pass_reaches_torch_in_two_dimensions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Three would have it copy the whole weight, where the slice's strides are not its own shape's.
    seen: list[torch.Tensor] = []

    def watched(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        seen.append(x)
        return x @ weight.T

    layer = FewRowsLinear(nn.Linear(16, 24, bias=False), frozenset())
    monkeypatch.setattr(linear.functional, "linear", watched)
    assert layer(torch.randn(1, 5, 16)[:, -1:]).shape == (1, 1, 24)
    assert [tuple(x.shape) for x in seen] == [(1, 16)]
    assert seen[0].stride() == (16, 1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 16)
        self.inner = nn.Sequential(nn.Linear(16, 16), nn.SiLU())
        self.head = nn.Linear(16, 24, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize(("turned_s", "expected"), [(0.5, set(range(1, 10))), (0.9, set())])
def test_a_product_is_turned_where_it_was_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, turned_s: float, expected: set[int]
) -> None:
    monkeypatch.setattr(linear, "_turned_rows", {})
    monkeypatch.setattr(
        linear, "pass_seconds", lambda product, *_: turned_s if product is turned_product else 1.0
    )
    model = Model()
    quicken(model)
    for layer in (model.inner[0], model.head):
        assert isinstance(layer, FewRowsLinear)
        assert layer.turned_rows == expected
    assert model.head.weight is model.embed.weight


def test_weights_of_one_shape_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    monkeypatch.setattr(linear, "_turned_rows", {})
    monkeypatch.setattr(
        linear, "_measure", lambda weights: frozenset(measured.append(len(weights)) or ())
    )
    quicken(Model())
    quicken(Model())
    assert measured == [1, 1]  # two shapes


def test_weights_without_memory_are_left_alone() -> None:
    with torch.device("meta"):
        model = Model()
    quicken(model)
    assert type(model.head) is nn.Linear
