"""Predictions of the experts that the target will choose, from states that are computed anyway.

While the draft writes a token, the state of each of its layers goes through the *target's* router
of the same layer, and the scores go to the runtime, layer by layer. Where the draft is of another
depth or width, a `LayerMap` stands for the router. Inside the target, the state of a layer goes
through the router of the next one.

Predictions change when bytes move, never the text.

Source: SP-MoE, arXiv:2510.10302, section 3.1; AdapMoE, arXiv:2408.10284, for the target's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from spmoe.config import MAX_ROWS
from spmoe.errors import InvalidArgument
from spmoe.models.loading import TargetModel
from spmoe.prediction.layer_map import MAPPED_STATE, LayerMap
from spmoe.prediction.routers import routers
from spmoe.prediction.states import STATES, check_state, decoder_layers, watch_input, watch_state

Report = Callable[[int, torch.Tensor], None]  # MoE layer, scores [experts]
Wanted = Callable[[int], bool]  # MoE layer -> whether a prediction for it is of any use now
Fail = Callable[[Exception], None]


def join(scores: torch.Tensor) -> torch.Tensor:
    """Return the scores of several tokens together: their sum.

    It stays at 1 or under for an expert that none of them selects, however many nearly do.

    Args:
        scores: [tokens, experts], as `Router.scores`.

    Returns:
        [experts].
    """
    total = scores.sum(dim=0)
    return total.where((scores > 1).any(dim=0), total.clamp(max=1))


def draft_mismatch(target: TargetModel, draft: Any) -> str | None:
    """Return why the draft's layers do not stand for the target's, None if they do."""
    ours, theirs = (model.config.get_text_config() for model in (target.model, draft))
    for what, name in (("layers", "num_hidden_layers"), ("hidden size", "hidden_size")):
        wanted, found = getattr(ours, name), getattr(theirs, name, None)
        if wanted != found:
            return f"the draft has {what} {found}, the target {wanted}"
    return None


@dataclass(frozen=True, slots=True)
class DraftReader:
    """How one MoE layer of the target is predicted from the draft.

    Attributes:
        layer: The draft's decoder layer whose state is read.
        state: Which of `spmoe.prediction.states.STATES`.
        scores: The state [tokens, draft hidden] -> scores [tokens, experts], as `Router.scores`.
    """

    layer: nn.Module
    state: str
    scores: Callable[[torch.Tensor], torch.Tensor]


def draft_readers(
    target: TargetModel, draft: Any, *, state: str = STATES[0], layer_map: LayerMap | None = None
) -> list[DraftReader]:
    """Return how the draft predicts the target's MoE layers, one for each. As `draft_predictions`.

    Raises:
        InvalidArgument: As there.
    """
    check_state(state)
    layers = decoder_layers(draft)
    if layer_map is not None:
        layer_map.check(target, draft)
        return [
            DraftReader(layers[number], MAPPED_STATE, partial(layer_map.scores, ordinal))
            for ordinal, number in enumerate(layer_map.draft_layers)
        ]
    if mismatch := draft_mismatch(target, draft):
        raise InvalidArgument(
            f"{mismatch}: its layers cannot stand for the target's without a layer map; run "
            "`spmoe profile` to fit one"
        )
    return [
        DraftReader(layers[layer.number], state, partial(router.scores, normed=state != "residual"))
        for layer, router in zip(target.moe_layers, routers(target), strict=True)
    ]


@contextmanager
def draft_predictions(
    target: TargetModel,
    draft: Any,
    report: Report,
    *,
    state: str = STATES[0],
    layer_map: LayerMap | None = None,
    wanted: Wanted = lambda _: True,
    on_error: Fail | None = None,
) -> Iterator[None]:
    """Report predictions for the target while ``draft`` runs, of the last token that it reads.

    Args:
        target: The model whose experts are predicted.
        draft: A transformers model; without a map, with as many layers and the same hidden size.
        report: Called with a MoE layer and its scores, layer by layer as the draft computes them.
        state: "residual" (the stream after attention, through the target's norm), "mlp-input"
            (after the draft's own norm) or "attention" (attention's output alone).
        layer_map: Stands for the target's routers. It reads the one state that it was fitted on.
        wanted: Asked before a layer's scores are computed; what is not wanted is not reported.
        on_error: Called with what a prediction raises; without it the pass of the model fails.

    Raises:
        InvalidArgument: The models differ in depth or width and there is no map, the map does not
            fit them, or the state is not one of these.
    """
    with ExitStack() as hooks:
        readers = draft_readers(target, draft, state=state, layer_map=layer_map)
        for ordinal, reader in enumerate(readers):

            def observe(
                captured: torch.Tensor, ordinal: int = ordinal, reader: DraftReader = reader
            ) -> None:
                if wanted(ordinal):
                    report(ordinal, reader.scores(captured[-1:])[0])

            watch_state(hooks, reader.layer, reader.state, _guarded(observe, on_error))
        yield


@contextmanager
def target_predictions(
    target: TargetModel,
    report: Report,
    *,
    first_row: Callable[[], int] = lambda: 0,
    wanted: Wanted = lambda _: True,
    on_error: Fail | None = None,
) -> Iterator[None]:
    """Report predictions for the next layer while each layer of the target runs a few tokens.

    Args:
        target: The model; passes of more than `MAX_ROWS` tokens (prompts), which need nearly every
            expert, are left alone.
        report: Called with a MoE layer and its scores.
        first_row: Called in each layer: rows before it are left out.
        wanted: As for `draft_predictions`.
        on_error: As for `draft_predictions`.
    """
    found = routers(target)
    with ExitStack() as hooks:
        for following, router in enumerate(found[:-1], 1):

            def observe(rows: torch.Tensor, following: int = following) -> None:
                if first_row() < len(rows) <= MAX_ROWS and wanted(following):
                    scores = found[following].scores(rows[first_row() :], normed=False)
                    report(following, join(scores))

            watch_input(hooks, router.norm, _guarded(observe, on_error))
        yield


def _guarded(
    observe: Callable[[torch.Tensor], None], on_error: Fail | None
) -> Callable[[torch.Tensor], None]:
    """Return ``observe``, whose exceptions go to ``on_error``."""
    if on_error is None:
        return observe

    def guarded(state: torch.Tensor) -> None:
        try:
            observe(state)
        except Exception as error:  # of the models' code
            on_error(error)

    return guarded
