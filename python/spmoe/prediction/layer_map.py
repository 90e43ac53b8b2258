"""`LayerMap`: what the target's routers will say, from a draft of another depth or width.

Source: ours. SP-MoE, arXiv:2510.10302, section 3.1, needs a draft of the target's depth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from spmoe.errors import InvalidArgument
from spmoe.models.loading import TargetModel
from spmoe.prediction.ridge import RidgeFit
from spmoe.prediction.states import decoder_layers, read_text, watch_routing, watch_state
from spmoe.reporting.progress import Progress, silent
from spmoe.system.whole_file import write_whole

# The draft's own norm makes tokens alike in size, as a linear map needs them.
MAPPED_STATE = "mlp-input"

_FORMAT = "1"  # of the file
_CHUNK_TOKENS = 512
_GROUP_BYTES = 1 << 30  # of the sums of draft layers that are fitted together


@dataclass(frozen=True, slots=True, eq=False)
class LayerMap:
    """A linear map from a draft's states to the logits of each of the target's routers.

    Attributes:
        draft_layers: For each MoE layer of the target, the draft's decoder layer that is read:
            the nearest by relative depth.
        weights: [MoE layers, draft hidden + 1, experts], float32; the last row is added.
        experts_per_token: The target's top-k.
        held_out_recall: For each MoE layer, the share of a token's experts that were among the
            map's top-k, on text that it was not fitted on.
    """

    draft_layers: tuple[int, ...]
    weights: torch.Tensor
    experts_per_token: int
    held_out_recall: tuple[float, ...]

    def scores(self, layer: int, state: torch.Tensor) -> torch.Tensor:
        """Return what the router of a MoE layer is expected to think of each of some tokens.

        Args:
            layer: MoE layer, 0-based.
            state: [tokens, draft hidden], what the draft's layer gives its MLP.

        Returns:
            [tokens, experts], float32: probabilities, and 1 more for each of the top-k.
        """
        weights = self.weights[layer]
        logits = state.float() @ weights[:-1] + weights[-1]
        index = logits.topk(self.experts_per_token, dim=-1).indices
        scores = logits.softmax(dim=-1)
        return scores.scatter_add(1, index, torch.ones_like(scores))

    def to(self, device: torch.device) -> LayerMap:
        """Return the same map with its weights on a device."""
        return replace(self, weights=self.weights.to(device))

    def mismatch(self, target: TargetModel, draft: Any) -> str | None:
        """Return why the map is of another pair, None if its shape fits this one."""
        _, inputs, experts = self.weights.shape
        for what, found, wanted in (
            ("draft layers", list(self.draft_layers), list(nearest_layers(target, draft))),
            ("draft hidden size", inputs - 1, _hidden(draft)),
            ("experts", experts, target.store.expert_count),
            ("experts per token", self.experts_per_token, target.experts_per_token),
        ):
            if found != wanted:
                return f"it was fitted for {what} {found}, this pair has {wanted}"
        return None

    def check(self, target: TargetModel, draft: Any) -> None:
        """Check that the map is of this pair.

        Raises:
            InvalidArgument: It is not.
        """
        if stale := self.mismatch(target, draft):
            raise InvalidArgument(f"the layer map is stale: {stale}; run `spmoe profile` again")

    def save(self, path: str | PathLike[str], pair: str) -> None:
        """Write the map as a safetensors file, whole or not at all.

        Args:
            path: In a directory that exists.
            pair: What the pair is known by; `load` wants the same.

        Raises:
            OSError: The disk is full, or another fault of writing.
        """
        tensors = {
            "weights": self.weights.contiguous(),
            "draft_layers": torch.tensor(self.draft_layers),
            "held_out_recall": torch.tensor(self.held_out_recall),
        }
        metadata = {
            "format": _FORMAT,
            "pair": pair,
            "experts_per_token": str(self.experts_per_token),
        }
        write_whole(Path(path), save(tensors, metadata))

    @classmethod
    def load(cls, path: str | PathLike[str], pair: str) -> Self:
        """Read what `save` wrote.

        Raises:
            InvalidArgument: The map is stale, damaged or not there; the message says what to do.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, ValueError, SafetensorError) as error:
            raise InvalidArgument(
                f"the layer map {path} cannot be read ({error}); run `spmoe profile` again"
            ) from error
        for what, found, wanted in (
            ("format", metadata.get("format"), _FORMAT),
            ("pair", metadata.get("pair"), pair),
        ):
            if found != wanted:
                raise InvalidArgument(
                    f"the layer map {path} is stale: it is of {what} {found}, {wanted} is wanted; "
                    "run `spmoe profile` again"
                )
        try:
            return cls._of(tensors, int(metadata["experts_per_token"]))
        except (KeyError, ValueError) as error:
            raise InvalidArgument(
                f"the layer map {path} is damaged ({error}); run `spmoe profile` again"
            ) from error

    @classmethod
    def _of(cls, tensors: Mapping[str, torch.Tensor], experts_per_token: int) -> Self:
        """Return the map of a file's tensors.

        Raises:
            KeyError: One is missing.
            ValueError: One has a wrong shape or dtype, or a value that none can have.
        """
        weights, layers, recall = (
            tensors[name] for name in ("weights", "draft_layers", "held_out_recall")
        )
        if (
            weights.ndim != 3
            or weights.dtype != torch.float32
            or not weights.isfinite().all()
            or layers.dtype != torch.int64
            or recall.dtype != torch.float32
            or not layers.shape == recall.shape == weights.shape[:1]
            or not 1 <= experts_per_token <= weights.shape[2]
        ):
            raise ValueError(
                f"weights {list(weights.shape)} of {weights.dtype} for {list(layers.shape)} layers"
            )
        return cls(
            draft_layers=tuple(layers.tolist()),
            weights=weights,
            experts_per_token=experts_per_token,
            held_out_recall=tuple(recall.tolist()),
        )


def nearest_layers(target: TargetModel, draft: Any) -> tuple[int, ...]:
    """Return, for each MoE layer, the draft's layer at about the same share of the depth."""
    ours, theirs = (len(decoder_layers(model)) for model in (target.model, draft))
    # The draft's layer in which the middle of the target's lies: of equal depths, the same one.
    return tuple((2 * layer.number + 1) * theirs // (2 * ours) for layer in target.moe_layers)


def fit(
    target: TargetModel,
    draft: Any,
    documents: Sequence[Sequence[int]],
    *,
    progress: Progress | None = None,
) -> LayerMap:
    """Fit a map by ridge regression over every token of a text that both models read.

    The strength of the penalty is chosen for each layer by recall on every fifth chunk of the
    text, which the trial fits leave out; the last fit has all of it. The target reads the text
    once. The draft reads it once for each group of its layers whose sums, 8 (hidden + 1)^2 bytes
    each, are held at a time: about 1 GiB, or one layer where that is more. The target's logits
    are held throughout, 4 bytes for each token, MoE layer and expert.

    Args:
        target: Its experts are attached to a runtime.
        draft: A transformers model of the same vocabulary.
        documents: Token ids of each; they are read apart, in chunks of up to 512.
        progress: Called for each chunk and each layer.

    Raises:
        InvalidArgument: There are fewer than two chunks of text.
    """
    report = progress or silent
    chunks = [
        document[begin : begin + _CHUNK_TOKENS]
        for document in documents
        for begin in range(0, len(document), _CHUNK_TOKENS)
    ]
    if len(chunks) < 2:
        raise InvalidArgument(
            f"a layer map needs at least two documents to be fitted and tried on, got {len(chunks)}"
        )
    layers = nearest_layers(target, draft)
    logits, chosen = _routing(target, chunks, report)
    fitted: dict[int, tuple[torch.Tensor, float]] = {}
    for group in _groups(sorted(set(layers)), _hidden(draft)):
        members = [[at for at, layer in enumerate(layers) if layer == number] for number in group]
        sums = [
            RidgeFit([logits[at] for at in places], [chosen[at] for at in places])
            for places in members
        ]
        _read_draft(draft, group, sums, chunks, report)
        for number, places, equations in zip(group, members, sums, strict=True):
            report("fitting the layer map", number, group[-1] + 1)
            fitted |= dict(zip(places, equations.fit(), strict=True))
    report("fitting the layer map", 1, 1)
    return LayerMap(
        draft_layers=layers,
        weights=torch.stack([fitted[at][0] for at in range(len(layers))]),
        experts_per_token=target.experts_per_token,
        held_out_recall=tuple(fitted[at][1] for at in range(len(layers))),
    )


def _routing(
    target: TargetModel, chunks: Sequence[Sequence[int]], report: Progress
) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]:
    """Return each MoE layer's logits and choices, a tensor for each chunk."""
    logits: list[list[torch.Tensor]] = [[] for _ in target.moe_layers]
    chosen: list[list[torch.Tensor]] = [[] for _ in target.moe_layers]
    with ExitStack() as hooks:
        for ordinal, layer in enumerate(target.moe_layers):

            def keep(scores: torch.Tensor, index: torch.Tensor, ordinal: int = ordinal) -> None:
                logits[ordinal].append(scores.float().cpu())
                chosen[ordinal].append(index.cpu())

            gate: Any = layer.gate
            watch_routing(hooks, gate, keep)
        for done, chunk in enumerate(chunks):
            report("the target reads the calibration text", done, len(chunks))
            read_text(target.model, chunk)
    return logits, chosen


def _read_draft(
    draft: Any,
    group: Sequence[int],
    sums: Sequence[RidgeFit],
    chunks: Sequence[Sequence[int]],
    report: Progress,
) -> None:
    layers = decoder_layers(draft)
    for done, chunk in enumerate(chunks):
        report("the draft reads the calibration text", done, len(chunks))
        with ExitStack() as hooks:
            for number, equations in zip(group, sums, strict=True):

                def add(state: torch.Tensor, done: int = done, to: RidgeFit = equations) -> None:
                    to.add(done, state)

                watch_state(hooks, layers[number], MAPPED_STATE, add)
            read_text(draft, chunk)


def _groups(numbers: Sequence[int], hidden: int) -> Iterator[Sequence[int]]:
    size = max(1, _GROUP_BYTES // (8 * (hidden + 1) ** 2))
    for begin in range(0, len(numbers), size):
        yield numbers[begin : begin + size]


def _hidden(model: Any) -> int:
    return int(model.config.get_text_config().hidden_size)
