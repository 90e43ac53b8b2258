"""Where a model's files are: a directory, or a hub id that becomes one."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedConfig

from spmoe.errors import CheckpointError, InvalidArgument
from spmoe.models.pretrained import read_config

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_ALL_BUT_WEIGHTS = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Files of a model, chosen once for all of its readers.

    Attributes:
        name: What the user calls the model, for messages.
        directory: Holds the configuration, and the tokenizer if there is one.
        config: What config.json says.
        shards: Every safetensors file of the weights; all of them exist.
        index: Shard of each tensor, by name, if the checkpoint has an index.
    """

    name: str
    directory: Path
    config: PreTrainedConfig
    shards: tuple[Path, ...]
    index: Mapping[str, str] | None

    def check_shard(self, shard: Path, tensors: Collection[str]) -> None:
        """Hold what a shard holds against what the index says.

        Args:
            shard: One of ``shards``.
            tensors: Names of its tensors.

        Raises:
            CheckpointError: It lacks a tensor, or has one of another shard.
        """
        if self.index is None:
            return
        missing = {tensor for tensor, file in self.index.items() if file == shard.name}
        strays = {tensor for tensor in tensors if self.index.get(tensor, shard.name) != shard.name}
        for wrong, found in ((missing - set(tensors), "lacks"), (strays, "holds")):
            if wrong:
                tensor = min(wrong)
                raise CheckpointError(
                    f"{shard} {found} the tensor {tensor} ({len(wrong)} such in all), which the "
                    f"index of {self.name} says is in {self.index[tensor]}: the index and the "
                    "shards are of different checkpoints; download the checkpoint again"
                )


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

    The weights are those that transformers would read: the file that config.json names as
    "transformers_weights", else model.safetensors, else the shards of the index.

    Args:
        model: As for `find_directory`.

    Raises:
        InvalidArgument: It is neither a directory nor a hub id, or `read_config` refuses it.
        CheckpointError: It has no safetensors weights, one of their files is missing, or the
            index or config.json is damaged.
    """
    name = fspath(model)
    directory = find_directory(model)
    config = read_config(name, directory)
    if (directory / _ADAPTER).is_file():
        raise InvalidArgument(
            f"{name} holds an adapter ({_ADAPTER}), which spmoe does not apply: merge it into its "
            "model (merge_and_unload of peft), and save that"
        )
    chosen = getattr(config, "transformers_weights", None)
    files, index = _weight_files(directory, chosen)
    if not Path(model).is_dir():
        directory = _fetch(model, [*_ALL_BUT_WEIGHTS, *(files or [_SINGLE])])
        files, index = _weight_files(directory, chosen)
    if not files:
        others = sorted(file.name for file in directory.glob("*.bin"))
        found = f", only {', '.join(others)}" if others else ""
        raise CheckpointError(
            f"{name} has no {_SINGLE} and no {_INDEX}{found}: spmoe reads safetensors; "
            "convert the weights with transformers' from_pretrained and save_pretrained"
        )
    missing = [file for file in files if not _is_file(directory / file)]
    if missing:
        raise CheckpointError(
            f"{_shortened(missing[0])}, one of the {len(files)} weight files of {name}, is missing "
            f"({len(missing)} missing in all): copy or download the checkpoint again"
        )
    return Checkpoint(name, directory, config, tuple(directory / file for file in files), index)


def _weight_files(directory: Path, chosen: Any) -> tuple[list[str], dict[str, str] | None]:
    """Return the weight files that the checkpoint says it has, if any, and its index."""
    if chosen is not None:
        _check_name(chosen, "transformers_weights of config.json")
        if not chosen.endswith((".safetensors", ".safetensors.index.json")):
            raise CheckpointError(
                f"config.json names {_shortened(chosen)} as transformers_weights, which is no "
                "safetensors file: spmoe reads no other"
            )
    elif _is_file(directory / _SINGLE):
        chosen = _SINGLE
    elif _is_file(directory / _INDEX):
        chosen = _INDEX
    else:
        return [], None
    if not chosen.endswith(".index.json"):
        return [chosen], None
    index = _read_index(directory / chosen)
    return sorted(set(index.values())), index


def _read_index(file: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise TypeError("weight_map is not an object with tensors in it")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is not a safetensors index ({error!r:.300}): download the checkpoint again"
        ) from error
    for shard in weight_map.values():
        _check_name(shard, str(file))
    return weight_map


def _check_name(name: Any, where: str) -> None:
    """Only files of the checkpoint's own directory are read."""
    if isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0"):
        return
    raise CheckpointError(
        f"{where} names {name!r:.100} as a weight file: spmoe reads files in the model's own "
        "directory only; move the file there and name it without a path"
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system
        return False


def _shortened(name: str) -> str:
    return name if len(name) <= 100 else f"{name[:100]}..."


def _fetch(model: str | PathLike[str], patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(fspath(model), allow_patterns=patterns))
    except (OSError, HFValidationError) as error:  # every failure of the network is an OSError
        reason = str(error).strip().splitlines()[0]
        raise InvalidArgument(
            f'"{fspath(model)}" is neither a directory nor a model that the hub or its local '
            f"cache has ({reason}): check the path, or download the model while online"
        ) from error
