"""Copies of a cache's state, so that tokens which were read can be forgotten.

Layers with keys and values replace these tensors and never write into them, so a copy of the
state holds them by reference. Recurrent and convolution states are written in place and copied.
"""

from __future__ import annotations

from typing import Any

import torch

_REPLACED = ("keys", "values")  # never written in place by transformers' dynamic layers


def copied_state(cache: Any) -> dict[str, Any]:
    """Return the state of a transformers cache; what the cache does later leaves it alone.

    Args:
        cache: A dynamic cache, of any class that keeps its state in its attributes and in those
            of its ``layers``.
    """
    return {
        "cache": {name: _copied(value) for name, value in vars(cache).items() if name != "layers"},
        "layers": [_layer_state(layer) for layer in cache.layers],
    }


def restore_state(cache: Any, state: dict[str, Any]) -> None:
    """Put a state from `copied_state` back into ``cache``, which then owns it."""
    vars(cache).update(state["cache"])
    del cache.layers[len(state["layers"]) :]  # made since, on first use
    for layer, kept in zip(cache.layers, state["layers"], strict=True):
        vars(layer).clear()
        vars(layer).update(kept)


def _layer_state(layer: Any) -> dict[str, Any]:
    return {
        name: value if name in _REPLACED else _copied(value) for name, value in vars(layer).items()
    }


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_copied(part) for part in value]
    return value
