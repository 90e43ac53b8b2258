"""The memory that a model's passes take, from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

_WIDENED_BYTES = 4  # scores, logits and experts' outputs are computed in float32

# Names that configurations have for the size of a dense MLP; the experts' own is left out.
_INNER_NAMES = ("intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size")
# Names that configurations have for the number of experts of a token.
TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a causal language model. Counts of elements, unless the name says bytes.

    Attributes:
        layers: Decoder layers with attention: those whose caches grow with the text.
        hidden: Of the residual stream.
        inner: Of the widest dense MLP.
        heads: Of queries.
        key_size: Of all keys that a layer keeps for a token.
        value_size: Of all values that a layer keeps for a token.
        query_size: Of all queries of a token.
        vocabulary: Tokens.
        experts_per_token: The top-k; 0 of a dense model.
        expert_inner: Of a routed expert.
        native_experts: spmoe computes the routed experts, not transformers.
        context: Tokens that the model can read.
        item_bytes: Of an element of weights and activations.
        keeps_scores: Attention keeps the scores of all heads ("eager"), not of a tile.
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    key_size: int
    value_size: int
    query_size: int
    vocabulary: int
    experts_per_token: int
    expert_inner: int
    native_experts: bool
    context: int
    item_bytes: int
    keeps_scores: bool

    @classmethod
    def of(cls, model: Any) -> Self:
        """Return the shape of a transformers model."""
        config: Any = model.config.get_text_config()
        heads = getattr(config, "num_attention_heads", None) or 0  # mamba has none
        groups = getattr(config, "num_key_value_heads", None) or heads
        head = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
        key_size = value_size = groups * head
        query_size = heads * head
        if nope := getattr(
            config, "qk_nope_head_dim", None
        ):  # latent: expanded is the most it keeps
            query_size = key_size = heads * (nope + config.qk_rope_head_dim)
            value_size = heads * config.v_head_dim
        inner = max(_sizes(config, _INNER_NAMES), default=4 * config.hidden_size)
        return cls(
            layers=_attention_layers(config) if heads else 0,
            hidden=config.hidden_size,
            inner=inner,
            heads=heads,
            key_size=key_size,
            value_size=value_size,
            query_size=query_size,
            vocabulary=config.vocab_size,
            experts_per_token=max(_sizes(config, TOP_K_NAMES), default=0),
            expert_inner=getattr(config, "moe_intermediate_size", None) or inner,
            native_experts=getattr(config, "_experts_implementation", None) == "spmoe",
            context=getattr(config, "max_position_embeddings", None) or 1 << 20,
            item_bytes=model.dtype.itemsize,
            keeps_scores=getattr(config, "_attn_implementation", "eager") == "eager",
        )

    def cache_bytes(self, tokens: int) -> int:
        """Return the bytes of keys and values of a text; a sliding window counts in full."""
        return self.layers * tokens * (self.key_size + self.value_size) * self.item_bytes

    def pass_bytes(self, tokens: int, context: int) -> int:
        """Return the bytes of temporaries that a pass holds at most at a time.

        Args:
            tokens: That it reads.
            context: In the cache at its end, these included.
        """
        # The residual stream, its norm, and what attention and MLP make of them.
        stream = 8 * self.hidden * self.item_bytes
        # Queries and keys before their norm, behind it and after rotation; values.
        projections = 3 * (self.query_size + self.key_size + self.value_size) * self.item_bytes
        if self.keeps_scores:  # with the mask added, in float32 for the softmax, and its result
            scores = self.heads * context * (3 * self.item_bytes + _WIDENED_BYTES)
        else:
            scores = context * self.item_bytes  # the mask
        mlp = 3 * self.inner * self.item_bytes
        a_token = stream + max(projections + scores, mlp + self._expert_bytes())
        # One layer's cache is copied as it grows, and its heads are repeated for the queries.
        repeated = 2 * self.query_size * self.item_bytes
        copied = (self.key_size + self.value_size) * self.item_bytes
        logits = self.vocabulary * (self.item_bytes + _WIDENED_BYTES)
        return tokens * a_token + context * (repeated + copied) + logits

    def _expert_bytes(self) -> int:
        """Return what routed experts hold of a token: of each choice, whoever computes it."""
        if self.native_experts:  # outputs of each choice, the input and the sum
            return (self.experts_per_token + 2) * self.hidden * _WIDENED_BYTES
        wide = 3 * self.expert_inner + 2 * self.hidden
        return self.experts_per_token * wide * self.item_bytes


def _attention_layers(config: Any) -> int:
    """Return the layers whose caches grow with the text; all, if the configuration names none."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if not isinstance(kinds, (list, tuple)):
        return int(config.num_hidden_layers)
    return sum("attention" in kind and "linear" not in kind for kind in kinds)


def _sizes(config: Any, names: tuple[str, ...]) -> list[int]:
    values = [getattr(config, name, None) for name in names]
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return [value for value in flat if isinstance(value, int)]
