"""Tiny random checkpoints: one of each model family, a dense draft, and their tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
VOCABULARY = 256 + len(SPECIAL_TOKENS)
PADDED_VOCABULARY = 264  # models pad their embeddings; tokens past VOCABULARY have no text

_SHAPE = {
    "vocab_size": PADDED_VOCABULARY,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # large enough that logits are far apart
    "tie_word_embeddings": False,
}
_LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
LINEAR_ATTENTION = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_GATED_DELTA = {
    **LINEAR_ATTENTION,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "num_experts": 8,
    "num_experts_per_tok": 3,
}


def config_of(model_type: str, **changed: Any) -> PreTrainedConfig:
    """A tiny configuration of a model type, dense or not."""
    return AutoConfig.for_model(model_type, **(_SHAPE | changed))


# Name of a family -> its configuration, tiny. The inner size is never the hidden size.
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "mixtral": lambda: config_of(
        "mixtral", intermediate_size=48, num_local_experts=8, num_experts_per_tok=2
    ),
    "qwen2_moe": lambda: config_of(
        "qwen2_moe",
        intermediate_size=96,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
        num_experts=8,
        num_experts_per_tok=3,
        mlp_only_layers=[1],
    ),
    "qwen3_moe": lambda: config_of(
        "qwen3_moe",
        head_dim=16,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=True,
    ),
    "olmoe": lambda: config_of(
        "olmoe", intermediate_size=32, num_experts=12, num_experts_per_tok=4
    ),
    "deepseek_v2": lambda: config_of(
        "deepseek_v2",
        **_LATENT_ATTENTION,
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=8,
        n_shared_experts=2,
        num_experts_per_tok=3,
        first_k_dense_replace=1,
        norm_topk_prob=True,
    ),
    "deepseek_v3": lambda: config_of(
        "deepseek_v3",
        **_LATENT_ATTENTION,
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=3,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        num_nextn_predict_layers=0,
    ),
    "glm4_moe": lambda: config_of(
        "glm4_moe",
        head_dim=16,
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=3,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        num_nextn_predict_layers=0,
    ),
    "granitemoe": lambda: config_of(
        "granitemoe",
        intermediate_size=48,
        num_local_experts=8,
        num_experts_per_tok=2,
        attention_multiplier=0.25,
    ),
    "phimoe": lambda: config_of(
        "phimoe", intermediate_size=48, num_local_experts=8, num_experts_per_tok=2
    ),
    "gpt_oss": lambda: config_of(
        "gpt_oss",
        head_dim=16,
        intermediate_size=48,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=32,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 256,
        },
    ),
    "ernie4_5_moe": lambda: config_of(
        "ernie4_5_moe",
        intermediate_size=96,
        moe_intermediate_size=32,
        moe_num_experts=8,
        moe_num_shared_experts=2,
        moe_k=3,
        moe_layer_start_index=1,
    ),
}

# Families whose routers take a second argument, such as a correction bias that the layer keeps.
BIASED_ROUTER_FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "minimax_m2": lambda: config_of(
        "minimax_m2", head_dim=16, intermediate_size=48, num_local_experts=8, num_experts_per_tok=3
    ),
    "afmoe": lambda: config_of(
        "afmoe",
        head_dim=16,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=3,
        num_shared_experts=1,
        num_dense_layers=1,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=32,
    ),
    "hy_v3": lambda: config_of(
        "hy_v3",
        head_dim=16,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=3,
        num_shared_experts=1,
        mlp_layer_types=["dense", "sparse", "sparse"],
    ),
}

# Families with layers that keep a recurrent state instead of keys and values.
RECURRENT_FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3_next": lambda: config_of("qwen3_next", **_GATED_DELTA),
    "qwen3_5_moe_text": lambda: config_of("qwen3_5_moe_text", **_GATED_DELTA),
    "qwen3_5_moe": lambda: AutoConfig.for_model(  # multimodal; its text part is the target
        "qwen3_5_moe",
        text_config=_SHAPE | _GATED_DELTA | {"model_type": "qwen3_5_moe_text"},
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
            "patch_size": 4,
        },
    ),
    "jamba": lambda: config_of(
        "jamba",
        intermediate_size=48,
        num_experts=8,
        num_experts_per_tok=2,
        expert_layer_period=2,
        expert_layer_offset=0,
        attn_layer_period=3,
        attn_layer_offset=1,
        mamba_d_state=8,
        use_mamba_kernels=False,
    ),
    "minimax": lambda: config_of(
        "minimax",
        head_dim=16,
        intermediate_size=48,
        num_local_experts=8,
        num_experts_per_tok=2,
        block_size=8,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    "granitemoehybrid": lambda: config_of(
        "granitemoehybrid",
        intermediate_size=48,
        shared_intermediate_size=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        attention_multiplier=0.25,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        mamba_n_heads=4,
        mamba_d_head=32,
        mamba_d_state=16,
        mamba_chunk_size=16,
    ),
}

ALL_FAMILIES = FAMILIES | BIASED_ROUTER_FAMILIES | RECURRENT_FAMILIES


def make_checkpoint(
    family: str,
    path: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    with_tokenizer: bool = True,
) -> Path:
    """Write a random model of ``family`` into ``path``, in several shards; return ``path``."""
    return write_model(
        ALL_FAMILIES[family](), path, seed=seed, dtype=dtype, with_tokenizer=with_tokenizer
    )


def make_dense_draft(path: Path, *, seed: int = 0, **changed: Any) -> Path:
    """Write a random one-layer Llama with the same tokenizer into ``path``; return ``path``."""
    config = config_of("llama", **({"intermediate_size": 96, "num_hidden_layers": 1} | changed))
    return write_model(config, path, seed=seed, dtype=torch.float32, with_tokenizer=True)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes; every text goes through it unchanged."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


def write_model(
    config: PreTrainedConfig,
    path: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    with_tokenizer: bool = True,
) -> Path:
    """Write a random model of ``config`` into ``path``, in several shards; return ``path``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        whole = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
        model = whole.from_config(config)
        _fill_biases(model)
    model.to(dtype).save_pretrained(path, max_shard_size="200KB")
    if with_tokenizer:
        make_tokenizer().save_pretrained(path)
    return path


def _fill_biases(model: PreTrainedModel) -> None:
    """A new model's biases are zero, and a zero hides that nobody added it."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "bias" in name:
                tensor.normal_(std=0.1)


def greedy(model: PreTrainedModel, prompt: torch.Tensor, count: int) -> list[int]:
    """``count`` tokens of transformers' own decoding loop after ``prompt`` [1, tokens]."""
    text = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=count,
        min_new_tokens=count,
    )
    return text[0, prompt.shape[1] :].tolist()
