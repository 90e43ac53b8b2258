"""The target `32x`: many small experts beside a shared one, in Qwen2-MoE's layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen2MoeConfig

from spmoe.demo.recipe import DenseLayer, noisy, shared_settings, to_bfloat16

Neurons = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class NoisyParts:
    """Each expert is a part of the dense FFN's inner neurons plus noise, beside a shared expert.

    Attributes:
        parts: An expert has one of so many equal parts of the neurons; every ``parts`` experts
            have all of them.
        noise: Standard deviation of the noise, in units of each matrix's own.
        routed_share: Of the FFN's output that the routed experts stand for; the shared expert
            stands for the rest.
    """

    experts: int = 32
    experts_per_token: int = 8
    parts: int = 4
    noise: float = 0.1
    routed_share: float = 0.3
    popularity: float = 0.3
    seed: int = 32

    def config(self, dense: LlamaConfig) -> Qwen2MoeConfig:
        """Return the configuration of the target."""
        return Qwen2MoeConfig(
            **shared_settings(dense),
            intermediate_size=dense.intermediate_size,
            moe_intermediate_size=dense.intermediate_size // self.parts,
            shared_expert_intermediate_size=dense.intermediate_size,
            num_experts=self.experts,
            num_experts_per_tok=self.experts_per_token,
            norm_topk_prob=True,
            architectures=["Qwen2MoeForCausalLM"],
        )

    def router_name(self, layer: int) -> str:
        """Return the name of the tensor that holds a layer's router."""
        return f"model.layers.{layer}.mlp.gate.weight"

    def layer_tensors(self, layer: int, dense: DenseLayer) -> Iterator[tuple[str, Tensor]]:
        """Yield the attention biases, the shared expert and the experts of a layer."""
        yield from self._attention_biases(layer, dense)
        yield from self._shared_expert(layer, dense)
        # Router weights sum to 1, so a token gets one part's worth: scale it to the whole.
        down = dense.down * np.float32(self.routed_share * self.parts)
        for expert, neurons in enumerate(self._neurons(layer, dense.gate.shape[0])):
            rng = np.random.default_rng([self.seed, layer, expert])
            matrices = {
                "gate_proj": dense.gate[neurons],
                "up_proj": dense.up[neurons],
                "down_proj": down[:, neurons],
            }
            for name, weight in matrices.items():
                yield (
                    f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight",
                    noisy(weight, self.noise, rng=rng),
                )

    def describe(self) -> str:
        """Return how the experts are made, in sentences."""
        return (
            f"Qwen2-MoE's layout: {self.experts} experts a layer, of which a token uses "
            f"{self.experts_per_token}, beside a shared one. Each expert is a seeded 1/{self.parts}"
            f" of the inner neurons of the draft's feed-forward network plus noise of "
            f"{self.noise:g} of each matrix's standard deviation; together the routed experts "
            f"stand for {self.routed_share:g} of that network, the shared expert for the rest."
        )

    def _neurons(self, layer: int, inter: int) -> Iterator[Neurons]:
        """Yield each expert's inner neurons, in their order in the dense FFN."""
        rng = np.random.default_rng([self.seed, layer])
        for _ in range(self.experts // self.parts):
            yield from np.sort(rng.permutation(inter).reshape(self.parts, -1), axis=1)

    def _shared_expert(self, layer: int, dense: DenseLayer) -> Iterator[tuple[str, Tensor]]:
        prefix = f"model.layers.{layer}.mlp"
        # Its gate is closed halfway, at sigmoid(0): twice the weight makes up for it.
        down = dense.down * np.float32(2 * (1 - self.routed_share))
        yield (
            f"{prefix}.shared_expert_gate.weight",
            torch.zeros(1, down.shape[0], dtype=torch.bfloat16),
        )
        yield f"{prefix}.shared_expert.gate_proj.weight", to_bfloat16(dense.gate)
        yield f"{prefix}.shared_expert.up_proj.weight", to_bfloat16(dense.up)
        yield f"{prefix}.shared_expert.down_proj.weight", to_bfloat16(down)

    def _attention_biases(self, layer: int, dense: DenseLayer) -> Iterator[tuple[str, Tensor]]:
        """Yield zeros: Qwen2 has biases and Llama has none."""
        for projection, size in dense.projected.items():
            yield (
                f"model.layers.{layer}.self_attn.{projection}.bias",
                torch.zeros(size, dtype=torch.bfloat16),
            )
