"""The normal equations of the layer map, against relations that are known."""

from __future__ import annotations

import pytest
import torch

from spmoe.prediction import ridge

HIDDEN, EXPERTS, TOP_K = 12, 6, 2


def made(
    chunks: int, *, noise: float = 0.0
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Return states and logits of some chunks, and the map [hidden + 1, experts] behind them."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(HIDDEN + 1, EXPERTS, generator=generator)
    states = [torch.randn(40, HIDDEN, generator=generator) + 0.5 for _ in range(chunks)]
    logits = [
        state @ weights[:-1] + weights[-1] + noise * torch.randn(40, EXPERTS, generator=generator)
        for state in states
    ]
    return states, logits, weights


def chosen(logits: list[torch.Tensor]) -> list[torch.Tensor]:
    return [chunk.topk(TOP_K).indices for chunk in logits]


def test_a_linear_relation_is_found_with_what_is_added_to_it() -> None:
    states, logits, weights = made(6)
    fitter = ridge.RidgeFit([logits], [chosen(logits)])
    for at, state in enumerate(states):
        fitter.add(at, state)
    ((found, recall),) = fitter.fit()
    assert recall == 1
    torch.testing.assert_close(found, weights, atol=2e-3, rtol=0)


def test_it_is_ridge_regression_of_all_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "STRENGTHS", (0.3,))
    states, logits, _ = made(6, noise=0.5)
    fitter = ridge.RidgeFit([logits], [chosen(logits)])
    for at, state in enumerate(states):
        fitter.add(at, state)
    ((found, _),) = fitter.fit()
    x = torch.cat([torch.cat(states), torch.ones(240, 1)], dim=1).double()
    penalty = 0.3 * x[:, :-1].square().sum(dim=0).mean() * torch.eye(HIDDEN + 1).double()
    penalty[-1, -1] = 0
    expected = torch.linalg.solve(x.T @ x + penalty, x.T @ torch.cat(logits).double())
    torch.testing.assert_close(found, expected.float())


def test_each_router_gets_its_own_weights_and_strength() -> None:
    states, logits, weights = made(6)
    noise = [torch.randn(40, EXPERTS, generator=torch.Generator().manual_seed(9)) for _ in states]
    fitter = ridge.RidgeFit([noise, logits], [chosen(noise), chosen(logits)])
    for at, state in enumerate(states):
        fitter.add(at, state)
    (_, of_noise), (found, recall) = fitter.fit()
    torch.testing.assert_close(found, weights, atol=2e-3, rtol=0)
    assert recall == 1
    assert of_noise < 0.6  # chance is a third


def test_recall_is_of_chunks_that_the_trials_have_not_seen() -> None:
    """As many features as tokens: what was seen is recalled by heart, what was not is not."""
    generator = torch.Generator().manual_seed(5)
    states = [torch.randn(HIDDEN, HIDDEN, generator=generator) for _ in range(2)]
    logits = [torch.randn(HIDDEN, EXPERTS, generator=generator) for _ in range(2)]
    fitter = ridge.RidgeFit([logits], [chosen(logits)])
    for at, state in enumerate(states):
        fitter.add(at, state)
    ((_, recall),) = fitter.fit()
    assert recall < 0.7
