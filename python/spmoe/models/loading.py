"""Models from checkpoints: the target without its experts, the draft, the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any, Unpack

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from spmoe.errors import CheckpointError, InvalidArgument
from spmoe.models.activation import Activation
from spmoe.models.checkpoint import Checkpoint, find_checkpoint, find_directory
from spmoe.models.experts import (
    IMPLEMENTATION,
    ExpertFormat,
    ExpertStore,
    MoeLayer,
    describe,
    find_layers,
    forbid_saving,
    without_experts,
)
from spmoe.models.linear import quicken
from spmoe.models.pretrained import build_empty, read_tokenizer
from spmoe.models.shapes import TOP_K_NAMES
from spmoe.models.weights import check_depth, read_model
from spmoe.reporting.progress import Progress
from spmoe.runtime import Runtime
from spmoe.settings import DTYPES, RuntimeSettingNames, Settings
from spmoe.store import open_store
from spmoe.system.out_of_memory import out_of_memory

HOST = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class TargetModel:
    """A Mixture-of-Experts model whose routed experts are not in memory.

    Its forward pass needs a runtime: see `spmoe.models.experts.attach`.

    Attributes:
        model: The transformers model, in eval mode, without gradients.
        moe_layers: Layers with routed experts, in the order of the forward pass.
        store: Where their experts rest; layer i of the store is ``moe_layers[i]``.
        experts_per_token: The routers' top-k.
        activation: What joins gate and up.
        end_token_ids: Tokens that end a text; perhaps none.
    """

    model: PreTrainedModel
    moe_layers: tuple[MoeLayer, ...]
    store: ExpertStore
    experts_per_token: int
    activation: Activation
    end_token_ids: frozenset[int]

    def open_runtime(
        self,
        settings: Settings | None = None,
        *,
        progress: Progress | None = None,
        **changes: Unpack[RuntimeSettingNames],
    ) -> Runtime:
        """Return a `Runtime` for these experts, not attached. Arguments and errors as of it."""
        return Runtime(
            self.store,
            experts_per_token=self.experts_per_token,
            activation=self.activation.name,
            alpha=self.activation.alpha,
            limit=self.activation.limit,
            settings=settings,
            progress=progress,
            **changes,
        )


def load_target(
    path: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device = HOST,
) -> TargetModel:
    """Load a Mixture-of-Experts model; its experts stay in the checkpoint.

    Everything that can be wrong with the model or its experts is found before weights are read.

    Args:
        path: Directory or hub id.
        dtype: Of everything but the experts; None means float32 on the host, the checkpoint's own
            on a CUDA device.
        device: Where everything but the experts is.

    Raises:
        InvalidArgument: There is no such model, or it has no experts that spmoe can compute.
        CheckpointError: The checkpoint is incomplete or damaged, or does not fit its config.
    """
    name = fspath(path)
    checkpoint = find_checkpoint(path)
    config = checkpoint.config
    check_depth(checkpoint)
    with without_experts(config):
        empty = build_empty(name, config)
    layers = find_layers(empty)
    if not layers:
        raise InvalidArgument(
            f"{name} ({config.model_type}) has no routed experts behind transformers' experts "
            "interface: if it is dense, pass it as the draft, or use transformers"
        )
    expected = describe(layers)
    store = _open_store(checkpoint, layers, expected)
    experts_per_token = _experts_per_token(name, config, expected.shape[0])
    if dtype is None and device.type != "cpu":
        dtype = _own_dtype(config)
    with without_experts(config):
        model, unread = read_model(
            checkpoint,
            type(empty),
            dtype=dtype,
            experts_implementation=IMPLEMENTATION,
            without=store.tensor_names,
        )
    if unread:
        raise CheckpointError(
            f"{name} has the tensor {min(unread)} ({len(unread)} such in all), for which its model "
            "has no place: it may be quantized or of another model; spmoe would leave it out"
        )
    store.check_unchanged()
    layers = find_layers(model)
    forbid_saving(model)
    place(model, device)
    return TargetModel(
        model=model,
        moe_layers=layers,
        store=store,
        experts_per_token=experts_per_token,
        activation=expected.activation,
        end_token_ids=_end_token_ids(model),
    )


def place(model: PreTrainedModel, device: torch.device) -> None:
    """Move a model to a device, in place, and make it as fast there as can be.

    Raises:
        OutOfMemory: It does not fit.
    """
    cure = 'use a smaller draft, dtype="bfloat16", or device="host"'
    with out_of_memory(f"{type(model).__name__} on {device}", cure):
        model.to(device)  # type: ignore[arg-type]
    quicken(model)


def load_draft(
    path: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device = HOST,
) -> PreTrainedModel:
    """Load a whole model that proposes tokens. Errors as for `load_target`.

    Args:
        path: Directory or hub id.
        dtype: None means the checkpoint's own: what the draft rounds changes no token.
        device: Where it runs.
    """
    checkpoint = find_checkpoint(path)
    if dtype is None:
        dtype = _own_dtype(checkpoint.config)
    draft = _load_whole(checkpoint, dtype)
    place(draft, device)
    return draft


def load_plain(path: str | PathLike[str], *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a whole model as transformers does, experts and all, computed one by one ("eager").

    Arguments and errors as for `load_target`.
    """
    return _load_whole(find_checkpoint(path), dtype)


def _load_whole(checkpoint: Checkpoint, dtype: torch.dtype | None) -> PreTrainedModel:
    check_depth(checkpoint)
    model_class = type(build_empty(checkpoint.name, checkpoint.config))
    model, _ = read_model(checkpoint, model_class, dtype=dtype, experts_implementation="eager")
    return model


def load_tokenizer(path: str | PathLike[str]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        path: Directory or hub id of the model.

    Raises:
        InvalidArgument: There is no such model.
        CheckpointError: It has no tokenizer that transformers can load.
    """
    return read_tokenizer(fspath(path), find_directory(path))


def _own_dtype(config: PreTrainedConfig) -> torch.dtype:
    """Return the dtype of a checkpoint by its configuration, float32 if that does not say."""
    own: Any = config.get_text_config().dtype
    return own if own in DTYPES else torch.float32


def _open_store(
    checkpoint: Checkpoint, layers: Sequence[MoeLayer], expected: ExpertFormat
) -> ExpertStore:
    name = checkpoint.name
    try:
        store = open_store(
            checkpoint.shards,
            layers=[layer.number for layer in layers],
            interleaved=expected.interleaved,
        )
    except InvalidArgument as error:
        raise InvalidArgument(
            f"{name} ({checkpoint.config.model_type}) keeps its experts under names or in a layout "
            f"that spmoe does not read ({error}); use transformers for this model"
        ) from error
    found = (store.expert_count, store.hidden, store.inter)
    if found != expected.shape:
        count, hidden, inter = expected.shape
        raise CheckpointError(
            f"{name} has {found[0]} experts of {found[1]} x {found[2]} a layer, but its "
            f"config.json asks for {count} of {hidden} x {inter}: they are not of the same model"
        )
    return store


def _experts_per_token(name: str, config: PreTrainedConfig, experts: int) -> int:
    text_config = config.get_text_config()
    for attribute in TOP_K_NAMES:
        value: Any = getattr(text_config, attribute, None)
        if isinstance(value, list) and value:
            value = max(value)
        if type(value) is int and value > experts:
            raise CheckpointError(
                f"config.json of {name} asks for {value} experts a token ({attribute}), but a "
                f"layer has {experts}: copy config.json from the original model"
            )
        if type(value) is int and value > 0:
            return value
    raise InvalidArgument(
        f"the configuration of {name} does not say how many experts a token uses (looked for "
        f"{', '.join(TOP_K_NAMES)}): add num_experts_per_tok to its config.json"
    )


def _end_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """Return the tokens at which ``generate`` ends a text: its own settings alone count."""
    generation: Any = model.generation_config
    ends = generation.eos_token_id
    if ends is None:
        return frozenset()
    return frozenset([ends] if isinstance(ends, int) else ends)
