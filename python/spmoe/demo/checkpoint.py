"""Writes a checkpoint as the hub has it: configuration, tokenizer, weights in shards."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from spmoe.demo.dense import Dense
from spmoe.demo.recipe import DenseLayer, Recipe, shared_settings
from spmoe.reporting.progress import Progress

SHARD_BYTES = 300 * 10**6
_GenerationConfig: Any = GenerationConfig  # transformers does not type it


def write_draft(directory: Path, source: Dense) -> None:
    """Write the dense model in bfloat16.

    Raises:
        OSError: The disk is full, or another fault of writing.
    """
    config = LlamaConfig(
        **shared_settings(source.model.config),
        intermediate_size=source.model.config.intermediate_size,
        architectures=["LlamaForCausalLM"],
    )
    _write_settings(directory, config, source.tokenizer)
    write_weights(
        directory,
        ((name, weight.bfloat16()) for name, weight in source.model.named_parameters()),
    )


def write_target(
    directory: Path, source: Dense, *, recipe: Recipe, routers: list[Tensor], progress: Progress
) -> None:
    """Write the target that a recipe makes of a dense model, in bfloat16.

    Args:
        directory: Exists.
        source: The dense model.
        recipe: How the experts are made.
        routers: Rows [experts, hidden] of each layer's router.
        progress: Called for each layer.

    Raises:
        OSError: The disk is full, or another fault of writing.
    """
    _write_settings(directory, recipe.config(source.model.config), source.tokenizer)
    write_weights(
        directory, _target_tensors(source.model, recipe, routers=routers, progress=progress)
    )


def write_weights(
    directory: Path, tensors: Iterable[tuple[str, Tensor]], *, shard_bytes: int | None = None
) -> None:
    """Write bfloat16 tensors into safetensors files and an index.

    At most one file's tensors are in memory at a time.

    Args:
        directory: Exists.
        tensors: By their names, in the order of writing.
        shard_bytes: Of a file, about; None means `SHARD_BYTES`.
    """
    most_bytes = SHARD_BYTES if shard_bytes is None else shard_bytes
    shards: list[Path] = []
    places: dict[str, int] = {}
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = 0

    def write() -> None:
        shards.append(directory / f"shard-{len(shards)}")
        _write_shard(shards[-1], pending)
        places.update(dict.fromkeys(pending, len(shards) - 1))
        pending.clear()

    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > most_bytes:
            write()
            pending_bytes = 0
        pending[name] = tensor
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    write()
    if len(shards) == 1:
        shards[0].rename(directory / "model.safetensors")
        return
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for shard, name in zip(shards, names, strict=True):
        shard.rename(directory / name)
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": {name: names[place] for name, place in sorted(places.items())},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file; its library would hold every byte twice more to do so."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)


def _target_tensors(
    model: LlamaForCausalLM, recipe: Recipe, *, routers: list[Tensor], progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    for name, weight in model.named_parameters():
        if ".mlp." not in name:
            yield name, weight.bfloat16()
    for number, (layer, router) in enumerate(zip(model.model.layers, routers, strict=True)):
        progress("writing the target's layers", number, len(routers))
        yield recipe.router_name(number), router.bfloat16()
        yield from recipe.layer_tensors(number, _dense_layer(layer))
    progress("writing the target's layers", len(routers), len(routers))


def _dense_layer(layer: LlamaDecoderLayer) -> DenseLayer:
    ffn, attention = layer.mlp, layer.self_attn
    return DenseLayer(
        gate=ffn.gate_proj.weight.numpy(),
        up=ffn.up_proj.weight.numpy(),
        down=ffn.down_proj.weight.numpy(),
        projected={
            name: getattr(attention, name).out_features for name in ("q_proj", "k_proj", "v_proj")
        },
    )


def _write_settings(
    directory: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    config.save_pretrained(directory)
    _GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    ).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
