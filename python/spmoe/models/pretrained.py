"""Files beside the weights, read by transformers: configuration, tokenizer, generation."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from spmoe.errors import CheckpointError, InvalidArgument
from spmoe.models.blame import blaming

_AutoModel: Any = AutoModelForCausalLM  # transformers does not type it
_CONFIG = "config.json"
_GENERATION = "generation_config.json"
_TOKENIZER = ("tokenizer_config.json", "tokenizer.json")


def read_config(name: str, directory: Path) -> PreTrainedConfig:
    """Read a model's configuration.

    Args:
        name: What the user calls the model, for messages.
        directory: Holds config.json.

    Returns:
        That of the causal language model, which may be a part of a multimodal one.

    Raises:
        CheckpointError: It is missing or damaged, or transformers does not know the model.
        InvalidArgument: The weights are quantized, or it is no causal language model.
    """

    def describe(reason: str) -> str:
        kept = _peek(directory / _CONFIG)
        if "auto_map" in kept:
            return (
                f'{name} is of model type "{kept.get("model_type")}", which transformers '
                f"{transformers.__version__} does not have. Its folder brings Python code for it, "
                "and spmoe never runs that: upgrade transformers, or use a checkpoint of a model "
                "type that transformers has"
            )
        return (
            f"{name} has no configuration that transformers can load ({reason}): its "
            f"{_CONFIG} is missing, damaged, or of a newer transformers; copy it from the "
            "original model, or upgrade transformers"
        )

    with blaming(describe):
        config: Any = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        text = config.get_text_config()
    for part in (config, text):
        quantized: Any = getattr(part, "quantization_config", None)
        if quantized is not None:
            method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
            raise InvalidArgument(
                f"{name} is quantized ({method}): spmoe reads float32, float16 and bfloat16; use "
                "the unquantized checkpoint, or convert it"
            )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InvalidArgument(
            f"{name} ({config.model_type}) is no causal language model to transformers "
            f"{transformers.__version__}: spmoe decodes text with models that "
            "AutoModelForCausalLM loads"
        )
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    classes = found if isinstance(found, list | tuple) else (found,)
    is_part = any(model.config_class is type(text) for model in classes)
    chosen: PreTrainedConfig = text if is_part else config
    return chosen


def build_empty(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model of ``config`` on "meta", without weights.

    Raises:
        CheckpointError: transformers cannot build what config.json asks for.
    """
    with (
        blaming(
            lambda reason: (
                f"transformers cannot build the model that {_CONFIG} of {name} asks for "
                f"({reason}): it is damaged or of another transformers; copy it from the original "
                "model"
            )
        ),
        torch.device("meta"),
    ):
        model: PreTrainedModel = _AutoModel.from_config(config, trust_remote_code=False)
    return model


def read_generation_config(name: str, directory: Path) -> GenerationConfig:
    """Read a model's settings for writing text, from config.json if they have no own file.

    Args:
        name: What the user calls the model, for messages.
        directory: Holds generation_config.json, config.json or both.

    Raises:
        CheckpointError: They are damaged.
    """
    is_own = (directory / _GENERATION).is_file()
    file = _GENERATION if is_own else _CONFIG
    with blaming(
        lambda reason: (
            f"{file} of {name} holds no settings that transformers can load ({reason}): copy it "
            "from the original model" + (", or remove it" if is_own else "")
        )
    ):
        settings: Any = GenerationConfig.from_pretrained(
            directory, config_file_name=file, _from_model_config=not is_own
        )
        for ids in ("eos_token_id", "bos_token_id", "pad_token_id"):
            value = getattr(settings, ids)
            for token in value if isinstance(value, list) else [value]:
                if token is not None and (type(token) is not int or token < 0):
                    raise TypeError(f"{ids} is {value!r:.100}, not a token id or a list of some")
    return settings  # type: ignore[no-any-return]


def read_tokenizer(name: str, directory: Path) -> PreTrainedTokenizerBase:
    """Read a model's tokenizer.

    Args:
        name: What the user calls the model, for messages.
        directory: Holds its files.

    Raises:
        CheckpointError: There is none that transformers can load.
    """
    cure = "copy tokenizer.json and tokenizer_config.json of the original model beside the weights"

    def describe(reason: str) -> str:
        kept = _peek(directory / _TOKENIZER[0])
        if "AutoTokenizer" in kept.get("auto_map", ()):
            return (
                f'the tokenizer of {name} is a "{kept.get("tokenizer_class")}", which transformers '
                f"{transformers.__version__} does not have. Its folder brings Python code for it, "
                "and spmoe never runs that: use a checkpoint with a tokenizer that transformers has"
            )
        at_fault = _damaged(directory, _TOKENIZER) or " or ".join(_TOKENIZER)
        return (
            f"{name} has no tokenizer that transformers can load: {at_fault} is damaged or of "
            f"another transformers ({reason}); {cure}"
        )

    with blaming(describe):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False
        )
        # Without a file, transformers makes an empty tokenizer of the family's class, and says
        # nothing.
        files = sorted(set(tokenizer.vocab_files_names.values()))
        if not any((directory / file).is_file() for file in files):
            raise CheckpointError(
                f"{name} has no tokenizer (looked for {', '.join(files)}): {cure}"
            )
        tokenizer("a b")  # what is damaged inside shows at the first text
    return tokenizer


def _peek(file: Path) -> dict[str, Any]:
    """Return what a JSON file holds; nothing if it is damaged or no object."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _damaged(directory: Path, files: Iterable[str]) -> str | None:
    """Return the first of ``files`` that is there and holds no JSON object."""
    return next((f for f in files if (directory / f).is_file() and not _peek(directory / f)), None)
