"""transformers' own loading, made quiet and strict."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from spmoe.errors import CheckpointError, InvalidArgument

_AutoModel: Any = AutoModelForCausalLM  # transformers types neither of these two
_logging: Any = logging


def read_config(name: str, directory: Path) -> PreTrainedConfig:
    """Read a model's configuration.

    Args:
        name: What the user calls the model, for messages.
        directory: Holds config.json.

    Raises:
        CheckpointError: It is missing or damaged, or transformers does not know the model.
        InvalidArgument: The weights are quantized.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{name} has no configuration that transformers can load ({_reason(error)}): its "
            "config.json is missing, damaged, or of a newer transformers"
        ) from error
    quantized: Any = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise InvalidArgument(
            f"{name} is quantized ({method}): spmoe reads float32, float16 and bfloat16; use the "
            "unquantized checkpoint, or convert it"
        )
    return config


def read_model(
    name: str,
    directory: Path,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype | None,
    experts_implementation: str,
) -> tuple[PreTrainedModel, set[str]]:
    """Read a model's weights; every tensor of the model must be in the checkpoint.

    Args:
        name: What the user calls the model, for messages.
        directory: Holds the safetensors files.
        config: From `read_config`.
        dtype: Of the weights in memory; None means float32.
        experts_implementation: transformers' name for the way to compute routed experts.

    Returns:
        The model, in eval mode, without gradients; and the tensors of the checkpoint, by the
        model's names for them, for which the model has no place.

    Raises:
        CheckpointError: A tensor is missing or has another shape, or a file is damaged.
    """
    try:
        with _silence():
            model, report = _AutoModel.from_pretrained(
                directory,
                config=config,
                dtype=dtype or torch.float32,
                experts_implementation=experts_implementation,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except SafetensorError as error:
        raise CheckpointError(
            f"a weight file of {name} is damaged ({error}): download the checkpoint again"
        ) from error
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


def read_tokenizer(name: str, directory: Path) -> PreTrainedTokenizerBase:
    """Read a model's tokenizer.

    Args:
        name: What the user calls the model, for messages.
        directory: Holds its files.

    Raises:
        CheckpointError: There is none that transformers can load.
    """
    cure = "copy tokenizer.json and tokenizer_config.json of the original model beside the weights"
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{name} has no tokenizer that transformers can load ({_reason(error)}): {cure}"
        ) from error
    # Without a file, transformers makes an empty tokenizer of the family's class, and says nothing.
    files = sorted(set(tokenizer.vocab_files_names.values()))
    if not any((directory / file).is_file() for file in files):
        raise CheckpointError(f"{name} has no tokenizer (looked for {', '.join(files)}): {cure}")
    return tokenizer


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


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
