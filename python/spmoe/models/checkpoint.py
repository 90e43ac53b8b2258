"""Where a model's files are: a directory, or a hub id that becomes one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from spmoe.errors import CheckpointError, InvalidArgument

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ALL_BUT_WEIGHTS = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Files of a model.

    Attributes:
        directory: Holds the configuration, and the tokenizer if there is one.
        shards: Every safetensors file of the weights; all of them exist.
    """

    directory: Path
    shards: tuple[Path, ...]


def find_directory(model: str | PathLike[str]) -> Path:
    """Return the directory of a model, fetching everything but weights of a hub id.

    Args:
        model: A directory, or a hub id ("owner/name"), which is looked for in the local cache
            first and, unless ``HF_HUB_OFFLINE`` is set, on the hub.

    Raises:
        InvalidArgument: It is neither.
    """
    directory = Path(model)
    return directory if directory.is_dir() else _fetch(model, _ALL_BUT_WEIGHTS)


def find_checkpoint(model: str | PathLike[str]) -> Checkpoint:
    """Return the files of a model, fetching those of a hub id.

    Args:
        model: As for `find_directory`.

    Raises:
        InvalidArgument: It is neither a directory nor a hub id.
        CheckpointError: It has no safetensors weights, or one of their files is missing.
    """
    directory = find_directory(model)
    names = _shard_names(directory)
    if not Path(model).is_dir():
        directory = _fetch(model, [*_ALL_BUT_WEIGHTS, *(names or [_SINGLE])])
        names = names or _shard_names(directory)
    if not names:
        others = sorted(file.name for file in directory.glob("*.bin"))
        found = f", only {', '.join(others)}" if others else ""
        raise CheckpointError(
            f"{fspath(model)} has no {_SINGLE} and no {_INDEX}{found}: spmoe reads safetensors; "
            "convert the weights with transformers' from_pretrained and save_pretrained"
        )
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{missing[0]}, one of the {len(names)} weight files of {fspath(model)}, is missing "
            f"({len(missing)} missing in all): copy or download the checkpoint again"
        )
    return Checkpoint(directory, tuple(directory / name for name in names))


def _shard_names(directory: Path) -> list[str]:
    """Return the weight files that the checkpoint says it has; none if it says nothing."""
    index = directory / _INDEX
    if not index.is_file():
        return [_SINGLE] if (directory / _SINGLE).is_file() else []
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is not a safetensors index ({error!r}): download the checkpoint again"
        ) from error


def _fetch(model: str | PathLike[str], patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(fspath(model), allow_patterns=patterns))
    except (OSError, HFValidationError) as error:  # every failure of the network is an OSError
        reason = str(error).strip().splitlines()[0]
        raise InvalidArgument(
            f'"{fspath(model)}" is neither a directory nor a model that the hub or its local '
            f"cache has ({reason}): check the path, or download the model while online"
        ) from error
