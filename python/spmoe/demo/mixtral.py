"""The target `8x`: a few large experts, in Mixtral's layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from transformers import LlamaConfig, MixtralConfig

from spmoe.demo.recipe import DenseLayer, noisy, shared_settings


@dataclass(frozen=True, slots=True)
class NoisyCopies:
    """Each expert is the whole dense FFN plus noise, as Mixtral is believed to have begun.

    Attributes:
        noise: Standard deviation of the noise, in units of each matrix's own.
    """

    experts: int = 8
    experts_per_token: int = 2
    noise: float = 0.12
    popularity: float = 0.3
    seed: int = 8

    def config(self, dense: LlamaConfig) -> MixtralConfig:
        """Return the configuration of the target."""
        return MixtralConfig(
            **shared_settings(dense),
            head_dim=dense.head_dim,
            intermediate_size=dense.intermediate_size,
            num_local_experts=self.experts,
            num_experts_per_tok=self.experts_per_token,
            sliding_window=None,
            architectures=["MixtralForCausalLM"],
        )

    def router_name(self, layer: int) -> str:
        """Return the name of the tensor that holds a layer's router."""
        return f"model.layers.{layer}.block_sparse_moe.gate.weight"

    def layer_tensors(self, layer: int, dense: DenseLayer) -> Iterator[tuple[str, Tensor]]:
        """Yield the experts of a layer."""
        matrices = {"w1": dense.gate, "w2": dense.down, "w3": dense.up}
        for expert in range(self.experts):
            rng = np.random.default_rng([self.seed, layer, expert])
            for name, weight in matrices.items():
                yield (
                    f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight",
                    noisy(weight, self.noise, rng=rng),
                )

    def describe(self) -> str:
        """Return how the experts are made, in sentences."""
        return (
            f"Mixtral's layout: {self.experts} experts a layer, of which a token uses "
            f"{self.experts_per_token}. Each expert is the draft's whole feed-forward network plus "
            f"seeded noise of {self.noise:g} of each matrix's standard deviation."
        )
