"""Weights of a whole model or of all but its experts: chosen and opened here, read once."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import logging

from spmoe.errors import CheckpointError
from spmoe.models.blame import blaming
from spmoe.models.checkpoint import Checkpoint
from spmoe.models.pretrained import read_generation_config

_logging: Any = logging  # transformers does not type it


def read_model(
    checkpoint: Checkpoint,
    model_class: type[PreTrainedModel],
    *,
    dtype: torch.dtype | None,
    experts_implementation: str,
    without: Collection[str] = (),
) -> tuple[PreTrainedModel, set[str]]:
    """Read a model's weights; every tensor of the model must be in the checkpoint.

    No tensor stays mapped to a file: files may change afterwards.

    Args:
        checkpoint: The model's files.
        model_class: Of the model.
        dtype: Of the weights in memory; None means float32.
        experts_implementation: transformers' name for the way to compute routed experts.
        without: Names of tensors that are left where they are.

    Returns:
        The model, in eval mode, without gradients; and the tensors of the checkpoint, by the
        model's names for them, for which the model has no place.

    Raises:
        CheckpointError: A tensor is missing or has another shape, or a file is damaged.
        OutOfMemory: They do not fit.
    """
    name = checkpoint.name
    settings = read_generation_config(name, checkpoint.directory)
    tensors = _open_tensors(checkpoint, without)
    with (
        blaming(
            lambda reason: (
                f"transformers cannot load {name} ({reason}): its config.json or its weights are "
                "damaged or of another transformers; download the checkpoint again"
            )
        ),
        _silence(),
    ):
        load: Any = model_class.from_pretrained
        model, report = load(
            None,
            config=checkpoint.config,
            state_dict=tensors,
            dtype=dtype or torch.float32,
            experts_implementation=experts_implementation,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    model.generation_config = settings
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{name} lacks the tensor {missing[0]} ({len(missing)} missing in all): the "
            "checkpoint is incomplete or of another model; download it again"
        )
    if mismatched := sorted(report["mismatched_keys"]):
        tensor, found, wanted = mismatched[0]
        raise CheckpointError(
            f"tensor {tensor} of {name} is {list(found)}, but its config.json asks for "
            f"{list(wanted)}: they are not of the same model"
        )
    return model.eval().requires_grad_(False), report["unexpected_keys"]


_MOST_LAYERS = 1000  # of the models that exist; more are counted before they are built


def check_depth(checkpoint: Checkpoint) -> None:
    """Refuse a configuration of more layers than the files hold tensors.

    Without this, a damaged number would keep transformers building layers for ever.

    Raises:
        CheckpointError: It asks for more.
    """
    layers = getattr(checkpoint.config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(layers, int) or layers <= _MOST_LAYERS:
        return
    count = len(_open_tensors(checkpoint, ()))
    if layers > count:
        raise CheckpointError(
            f"config.json of {checkpoint.name} asks for {layers} layers (num_hidden_layers), but "
            f"its weight files hold {count} tensors in all: download the checkpoint again"
        )


def _open_tensors(checkpoint: Checkpoint, without: Collection[str]) -> dict[str, Any]:
    """Return every tensor but some, by name, each read as transformers slices it."""
    left_out = set(without)
    tensors: dict[str, Any] = {}
    for shard in checkpoint.shards:
        with blaming(
            lambda reason, shard=shard: (  # type: ignore[misc]
                f"a weight file of {checkpoint.name}, {shard.name}, is damaged or cannot be read "
                f"({reason}): download the checkpoint again"
            )
        ):
            file = _open(shard)
            names = set(file.keys())
            checkpoint.check_shard(shard, names)
            if twice := names & tensors.keys():
                raise CheckpointError(
                    f"{checkpoint.name} holds the tensor {min(twice)} twice, in {shard.name} and "
                    "in another shard: download the checkpoint again"
                )
            tensors |= {name: file.get_slice(name) for name in names - left_out}
    return tensors


def _open(shard: Path) -> Any:
    try:
        # Read, not mapped: a mapped file that is cut short ends the process (SIGBUS).
        return safe_open(shard, framework="pt", backend="pread")
    except FileNotFoundError:  # safetensors says so whatever the reason
        with shard.open("rb"), shard.open("rb"):
            pass
        raise


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep transformers' load report and progress bar, which would list every expert, quiet."""
    verbosity, bars = _logging.get_verbosity(), _logging.is_progress_bar_enabled()
    _logging.set_verbosity_error()
    _logging.disable_progress_bar()
    try:
        yield
    finally:
        _logging.set_verbosity(verbosity)
        if bars:
            _logging.enable_progress_bar()
