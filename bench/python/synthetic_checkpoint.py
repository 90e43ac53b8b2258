"""Checkpoints of shipped models' shapes with random weights, for speed alone.

Tensors, their names and their order are those of the hub's files; configuration and a tokenizer of
bytes go with them, so that `spmoe.load` and `spmoe.open_store` take the result. With random
weights routers choose at random and texts mean nothing: see `replay_routing.py`. gpt-oss, which
ships in MXFP4, is written in bfloat16 too.

    python bench/python/synthetic_checkpoint.py mixtral-8x7b /tmp/mixtral --layers 4
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.core_model_loading import revert_weight_conversion

from spmoe.cli.progress import progress_bar
from spmoe.config import format_bytes
from spmoe.demo.checkpoint import write_weights
from spmoe.errors import Error
from spmoe.models.experts import ExpertFormat, describe, find_layers, without_experts
from spmoe.reporting.progress import Progress, silent

# Each model's own config.json, as far as it sets sizes. "layers" are those with routed experts.
SHAPES: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
    },
    "phi-3.5-moe": {
        "model_type": "phimoe",
        "layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 6400,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "vocab_size": 32064,
        "attention_bias": True,
        "lm_head_bias": True,
    },
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2",
        "layers": 26,
        "first_k_dense_replace": 1,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "vocab_size": 102400,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "layers": 48,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "vocab_size": 151936,
    },
    "olmoe-1b-7b": {
        "model_type": "olmoe",
        "layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "vocab_size": 50304,
    },
    "qwen1.5-moe-a2.7b": {
        "model_type": "qwen2_moe",
        "layers": 24,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "vocab_size": 151936,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "layers": 24,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "vocab_size": 201088,
    },
    "gpt-oss-120b": {
        "model_type": "gpt_oss",
        "layers": 36,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "vocab_size": 201088,
    },
}

_WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "vocab_size",
)
_SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
_TOKENS = 256 + len(_SPECIAL_TOKENS)  # a byte each, and these
# Of the random numbers that all weights are cut from; a prime, so that no two rows are alike.
_POOL_LENGTH = (1 << 25) - 39

_AutoModel: Any = AutoModelForCausalLM  # transformers does not type it


def make_config(shape: str, *, layers: int | None = None, shrink: int = 1) -> PreTrainedConfig:
    """Return the configuration of a model of that shape.

    Args:
        shape: One of `SHAPES`.
        layers: Layers with routed experts; None: as many as the model has.
        shrink: Divides hidden, inner and vocabulary sizes, for trials.
    """
    sizes = SHAPES[shape].copy()
    moe_layers = sizes.pop("layers")
    for width in _WIDTHS:
        if width in sizes:
            sizes[width] //= shrink
    sizes["vocab_size"] = max(sizes["vocab_size"], _TOKENS)
    dense_layers = sizes.get("first_k_dense_replace", 0)
    return AutoConfig.for_model(
        **sizes, num_hidden_layers=dense_layers + (layers or moe_layers), tie_word_embeddings=False
    )


def hub_tensors(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint by the hub's name, on "meta", layer by layer."""
    with torch.device("meta"):
        model: PreTrainedModel = _AutoModel.from_config(
            config, dtype=torch.bfloat16, trust_remote_code=False
        )
    tensors: dict[str, torch.Tensor] = revert_weight_conversion(model, model.state_dict())
    return dict(sorted(tensors.items(), key=lambda item: _natural(item[0])))


def expert_format(config: PreTrainedConfig) -> ExpertFormat:
    """Return the format of the experts, for `spmoe.open_store` and `spmoe.Runtime`."""
    with without_experts(config), torch.device("meta"):
        layers = find_layers(_AutoModel.from_config(config, trust_remote_code=False))
    return describe(layers)


def write_checkpoint(
    directory: Path,
    config: PreTrainedConfig,
    *,
    seed: int = 0,
    shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Write a random checkpoint of ``config`` in bfloat16 and return its bytes of weights.

    Holds a shard, or one tensor if that is larger, at a time.

    Args:
        directory: Must be empty or not be there; removed again if writing fails.
        config: As from `make_config`; what it lacks to be loaded is set.
        seed: Of the weights.
        shard_bytes: As for `write_weights`.
        progress: Called with a description, and done of total, in MiB.

    Raises:
        Error: The directory has something in it, or its disk has no room.
    """
    tensors = hub_tensors(config)
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise Error(f"{directory} is not empty: name another directory, or remove it")
    free = shutil.disk_usage(directory).free
    if free < total_bytes:
        directory.rmdir()
        raise Error(
            f"the checkpoint needs {total_bytes} bytes ({format_bytes(total_bytes)}) in "
            f"{directory}, but {free} ({format_bytes(free)}) are free there; write fewer --layers, "
            "or to another disk"
        )
    try:
        _write_settings(directory, config)
        write_weights(
            directory,
            _fill(tensors, config, seed=seed, report=progress or silent),
            shard_bytes=shard_bytes,
        )
    except BaseException:
        shutil.rmtree(directory)
        raise
    return total_bytes


def _fill(
    tensors: dict[str, torch.Tensor], config: PreTrainedConfig, *, seed: int, report: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor with values: norms are 1, the rest is random."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(_POOL_LENGTH, generator=generator)
    pool = pool.mul_(getattr(config, "initializer_range", 0.02)).bfloat16()
    total = sum(tensor.nbytes for tensor in tensors.values()) >> 20
    done_bytes = 0
    for name, tensor in tensors.items():
        if tensor.ndim == 1 and "norm" in name and not name.endswith("bias"):
            yield name, torch.ones(tensor.shape, dtype=torch.bfloat16)
        else:
            yield name, _cut(pool, tensor.shape, generator)
        done_bytes += tensor.nbytes
        report("writing random weights", done_bytes >> 20, total)


def _cut(pool: torch.Tensor, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Return a tensor of what the pool has from a random place on, round and round."""
    place = int(torch.randint(len(pool), (1,), generator=generator))
    flat = torch.empty(shape.numel(), dtype=pool.dtype)
    done = 0
    while done < len(flat):
        part = pool[place : place + len(flat) - done]
        flat[done : done + len(part)] = part
        done += len(part)
        place = 0
    return flat.view(shape)


def _write_settings(directory: Path, config: PreTrainedConfig) -> None:
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL_TOKENS.values()))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_SPECIAL_TOKENS).save_pretrained(
        directory
    )
    for token, text in _SPECIAL_TOKENS.items():
        setattr(config, f"{token}_id", tokenizer.token_to_id(text))
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    config.dtype = torch.bfloat16
    config.save_pretrained(directory)


def _natural(name: str) -> list[str | int]:
    """Return a key that puts layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


@click.command()
@click.argument("shape", type=click.Choice(list(SHAPES)))
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--layers", type=click.IntRange(min=1), help="Layers with experts; all by default.")
@click.option("--shrink", type=click.IntRange(min=1), default=1, help="Divides widths, for trials.")
@click.option("--seed", default=0)
def main(shape: str, directory: Path, layers: int | None, shrink: int, seed: int) -> None:
    """Write a checkpoint of SHAPE into DIRECTORY."""
    config = make_config(shape, layers=layers, shrink=shrink)
    try:
        with progress_bar(quiet=False) as progress:
            written = write_checkpoint(directory, config, seed=seed, progress=progress)
    except Error as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{directory}: {shape}, {written / 1e9:.2f} GB of random weights in bfloat16")


if __name__ == "__main__":
    main()
