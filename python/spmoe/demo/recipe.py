"""The parts of a target that every layout shares."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig

Matrix = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True, slots=True)
class DenseLayer:
    """The weights of a dense layer that a recipe uses.

    Attributes:
        gate: Of the FFN, [inter, hidden].
        up: [inter, hidden].
        down: [hidden, inter].
        projected: What the attention's projections q_proj, k_proj, v_proj put out, in numbers.
    """

    gate: Matrix
    up: Matrix
    down: Matrix
    projected: Mapping[str, int]


class Recipe(Protocol):
    """How a dense model becomes a Mixture-of-Experts model. A frozen dataclass of numbers."""

    @property
    def experts(self) -> int:
        """Return the routed experts of a layer."""

    @property
    def popularity(self) -> float:
        """Return how unequally liked they are; see `spmoe.demo.routing.router_rows`."""

    @property
    def seed(self) -> int:
        """Return what all random numbers derive from."""

    def config(self, dense: LlamaConfig) -> PreTrainedConfig:
        """Return the configuration of the target."""

    def router_name(self, layer: int) -> str:
        """Return the name of the tensor that holds a layer's router."""

    def layer_tensors(self, layer: int, dense: DenseLayer) -> Iterator[tuple[str, Tensor]]:
        """Yield what else a layer has that the dense model has not, bfloat16, by name."""

    def describe(self) -> str:
        """Return how the experts are made, in sentences."""


def noisy(weight: Matrix, noise: float, *, rng: np.random.Generator) -> Tensor:
    """Return a matrix plus normal noise, in bfloat16.

    Args:
        weight: Of any shape.
        noise: Standard deviation of the noise, in units of the matrix's own.
        rng: Where the noise comes from.
    """
    changed = rng.standard_normal(weight.shape, dtype=np.float32)
    changed *= np.float32(noise * weight.std(dtype=np.float64))
    changed += weight
    return to_bfloat16(changed)


def to_bfloat16(weight: Matrix) -> Tensor:
    """Return a copy in bfloat16, contiguous."""
    return torch.from_numpy(np.ascontiguousarray(weight)).to(torch.bfloat16)


def shared_settings(dense: LlamaConfig) -> dict[str, Any]:
    """Return the settings of the target that are the dense model's own."""
    names = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "tie_word_embeddings",
    )
    return {name: getattr(dense, name) for name in names} | {"dtype": torch.bfloat16}


def fingerprint(*parts: object) -> str:
    """Return a text that changes when a part does: a recipe (with its type), a text, a number."""
    described = [
        [type(part).__name__, dataclasses.asdict(part)]
        if dataclasses.is_dataclass(part) and not isinstance(part, type)
        else part
        for part in parts
    ]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
