"""Runs a target and a draft to see how good predictions from their states are; see `recall`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from recall import TokenTally
from spmoe.bench.degrade import exchange
from spmoe.decoding import speculative
from spmoe.models.cache_support import cache_support, cached
from spmoe.models.loading import TargetModel
from spmoe.prediction.layer_map import LayerMap
from spmoe.prediction.predictor import (
    DraftReader,
    draft_mismatch,
    draft_predictions,
    draft_readers,
    target_predictions,
)
from spmoe.prediction.routers import routers
from spmoe.prediction.states import (
    STATES,
    read_text,
    watch_input,
    watch_routing,
    watch_state,
)
from spmoe.reporting.progress import Progress, silent
from spmoe.runtime import Runtime

LAYER_MAP, PREVIOUS_LAYER = "layer map", "previous layer"  # sources beside the draft's states

# The source that predicts a verification's last row, which drafting alone leaves unread: nobody,
# the draft by reading one token more, or the target's previous layer, as "horizon" has it.
LastRow = Literal["nobody", "draft", "target"]


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids that both models read; those from position ``first`` on are counted."""

    token_ids: list[int]
    first: int = 0


def by_token(
    target: TargetModel,
    draft: Any,
    texts: Sequence[Text],
    *,
    layer_map: LayerMap | None = None,
    exchanged: Sequence[float] = (),
    progress: Progress | None = None,
) -> dict[str, list[TokenTally]]:
    """Compare what could be predicted from, token by token, on texts that are given.

    Args:
        target: Its experts are attached to a runtime.
        draft: A transformers model.
        texts: Of no more tokens than the models' context.
        layer_map: Adds the source `LAYER_MAP`.
        exchanged: Adds, for each share, the default state with so many of the predicted experts
            exchanged for random ones, as `spmoe bench --degrade-prediction` does.
        progress: Called for each text.

    Returns:
        Source -> a tally for each MoE layer. Sources are the draft's states `STATES`, if its
        layers stand for the target's; the layer map; and the target's `PREVIOUS_LAYER`, which
        knows nothing of the first.
    """
    report = progress or silent
    sources: dict[str, list[DraftReader]] = {}
    if draft_mismatch(target, draft) is None:
        sources = {state: draft_readers(target, draft, state=state) for state in STATES}
        for share in exchanged:
            sources[exchanged_source(share)] = [
                replace(reader, scores=partial(_exchange, reader.scores, share, random.Random(0)))
                for reader in sources[STATES[0]]
            ]
    if layer_map is not None:
        sources[LAYER_MAP] = draft_readers(target, draft, layer_map=layer_map)
    tallies = {
        source: [TokenTally() for _ in target.moe_layers] for source in (*sources, PREVIOUS_LAYER)
    }
    found = routers(target)
    for done, text in enumerate(texts):
        report("both models read the texts", done, len(texts))
        predicted: dict[tuple[str, int], torch.Tensor] = {}
        with ExitStack() as hooks:
            for source, readers in sources.items():
                for ordinal, reader in enumerate(readers):
                    keep = partial(_keep, predicted, (source, ordinal), reader.scores)
                    watch_state(hooks, reader.layer, reader.state, keep)
            for ordinal in range(1, len(found)):
                scores = partial(found[ordinal].scores, normed=False)
                keep = partial(_keep, predicted, (PREVIOUS_LAYER, ordinal), scores)
                watch_input(hooks, found[ordinal - 1].norm, keep)
            read_text(draft, text.token_ids)
            for ordinal, layer in enumerate(target.moe_layers):

                def count(
                    _: torch.Tensor,
                    chosen: torch.Tensor,
                    ordinal: int = ordinal,
                    predicted: dict[tuple[str, int], torch.Tensor] = predicted,
                    first: int = text.first,
                ) -> None:
                    for source, by_layer in tallies.items():
                        if (source, ordinal) in predicted:
                            scores = predicted[source, ordinal][first:]
                            by_layer[ordinal].add(scores, chosen[first:])

                watch_routing(hooks, layer.gate, count)
            read_text(target.model, text.token_ids)
    report("both models read the texts", len(texts), len(texts))
    return tallies


def exchanged_source(share: float) -> str:
    """Return what `by_token` calls the default state with a share of experts exchanged."""
    return f"{STATES[0]}, {share:.0%} exchanged"


def _exchange(
    scores: Callable[[torch.Tensor], torch.Tensor],
    share: float,
    generator: random.Random,
    state: torch.Tensor,
) -> torch.Tensor:
    return torch.stack([exchange(row, share, generator) for row in scores(state)])


def _keep(
    predicted: dict[tuple[str, int], torch.Tensor],
    at: tuple[str, int],
    scores: Callable[[torch.Tensor], torch.Tensor],
    state: torch.Tensor,
) -> None:
    predicted[at] = scores(state)


def by_verification(
    target: TargetModel,
    draft: Any,
    runtime: Runtime,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    draft_length: int = 4,
    last_row: LastRow = "nobody",
    layer_map: LayerMap | None = None,
    progress: Progress | None = None,
) -> list[Text]:
    """Decode with a draft whose predictions go to the runtime, whatever its policy.

    Args:
        target: Its experts are attached to ``runtime``.
        draft: A transformers model.
        runtime: Counts; see `recall.of_verifications` and `of_scores`. Its policy must ask
            for no predictions itself: "on-demand" does not.
        prompts: Token ids of each.
        max_new_tokens: Of each prompt; no token ends a text.
        draft_length: Tokens drafted an iteration.
        last_row: The source that predicts for the last token that is verified; see `LastRow`.
        layer_map: As for `spmoe.prediction.predictor.draft_predictions`.
        progress: Called for each prompt.

    Returns:
        Prompt and text of each, what was written being counted.
    """
    report = progress or silent
    texts = []
    drafted_rows = 0

    def report_draft(layer: int, scores: torch.Tensor) -> None:
        nonlocal drafted_rows
        drafted_rows += layer == 0
        runtime.predict(layer, scores, source="draft")

    def report_target(layer: int, scores: torch.Tensor) -> None:
        runtime.predict(layer, scores, source="target")

    for model in (target.model, draft):
        cache_support(model)  # tries the model before its predictions count
    with ExitStack() as hooks:
        hooks.enter_context(draft_predictions(target, draft, report_draft, layer_map=layer_map))
        if last_row == "target":
            hooks.enter_context(
                target_predictions(target, report_target, first_row=lambda: drafted_rows)
            )
        for done, prompt in enumerate(prompts):
            report("decoding", done, len(prompts))
            runtime.begin_request()
            written = list(prompt)
            for iteration in speculative.decode(
                cached(target.model),
                cached(draft),
                prompt,
                draft_length=draft_length,
                max_length=len(prompt) + max_new_tokens,
                read_last=lambda: last_row == "draft",
            ):
                runtime.end_iteration(iteration.accepted)
                drafted_rows = 0
                written += iteration.tokens
            texts.append(Text(written, len(prompt)))
    report("decoding", len(prompts), len(prompts))
    return texts
