"""A Llama model and its tokenizer out of a GGUF file, dequantized."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spmoe.errors import InvalidArgument

_Llama: Any = LlamaForCausalLM  # transformers types neither of these two
_TokenizerFast: Any = PreTrainedTokenizerFast
_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3


def read_llama(path: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return the model in float32, and the tokenizer with its chat template.

    Raises:
        InvalidArgument: The package that reads such files is not installed.
    """
    try:
        reader = import_module("gguf").GGUFReader(path)
    except ModuleNotFoundError as error:
        raise InvalidArgument(
            f"{path.name} is read by the package gguf, which is not installed: pip install gguf"
        ) from error
    fields = _Fields(reader)
    return _model(reader, _config(fields)), _tokenizer(fields)


class _Fields:
    """Metadata of a GGUF file by key."""

    def __init__(self, reader: Any) -> None:
        self._fields = reader.fields

    def __getitem__(self, key: str) -> Any:
        return self._fields[key].contents()


def _config(fields: _Fields) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        # Stored as float32: 1e-5 comes back as 9.99999974e-06.
        rms_norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
    )


def _model(reader: Any, config: LlamaConfig) -> LlamaForCausalLM:
    quants = import_module("gguf.quants")
    with torch.random.fork_rng(devices=()):  # a new model draws weights, which are replaced here
        model: LlamaForCausalLM = _Llama(config).eval().requires_grad_(False)
    for tensor in reader.tensors:
        weight = quants.dequantize(tensor.data, tensor.tensor_type)
        name = str(tensor.name)
        if ".attn_q." in name:
            weight = _unpermute(weight, config.num_attention_heads)
        elif ".attn_k." in name:
            weight = _unpermute(weight, config.num_key_value_heads or config.num_attention_heads)
        model.get_parameter(_name(name)).copy_(torch.tensor(weight))
    return model


def _tokenizer(fields: _Fields) -> PreTrainedTokenizerFast:
    tokens = fields["tokenizer.ggml.tokens"]
    kinds = fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    made: PreTrainedTokenizerFast = _TokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **{
            f"{short}_token": tokens[fields[f"tokenizer.ggml.{long}_token_id"]]
            for short, long in named.items()
        },
    )
    return made


def _name(name: str) -> str:
    """Return transformers' name of a tensor: blk.3.attn_q.weight is model.layers.3.self_attn..."""
    if name in _TENSORS:
        return _TENSORS[name]
    _, layer, kind, suffix = name.split(".")
    return f"model.layers.{layer}.{_LAYER_TENSORS[kind]}.{suffix}"


def _unpermute(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Undo llama.cpp's order of rows, where the two halves of each head's rotation alternate."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, rows // heads // 2, 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)
