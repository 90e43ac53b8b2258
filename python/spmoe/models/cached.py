"""A transformers causal language model with the key-value cache of one sequence."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

CausalLM = PreTrainedModel


class CachedCausalLM:
    """Reads tokens of one sequence and can forget the last of them; see `speculative`.

    Rewinding is exact: continuing after it gives the bits of a cache that never read the rest.
    """

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self._cache: Any = DynamicCache(config=model.config)
        # transformers renamed the argument in 5.24.
        named = inspect.signature(model.forward).parameters
        self._cache_argument = "cache" if "cache" in named else "past_key_values"

    @property
    def length(self) -> int:
        """Tokens read and remembered."""
        return int(self._cache.get_seq_length())

    def read(self, tokens: Sequence[int], *, last: int = 1) -> torch.Tensor:
        """Read ``tokens``; return the logits behind the ``last`` of them, [last, vocab].

        None are computed for 0.
        """
        first = self.length == 0
        arguments: dict[str, Any] = {
            "input_ids": torch.tensor([list(tokens)], device=self._model.device),
            "use_cache": True,
            self._cache_argument: self._cache,
        }
        with torch.inference_mode():
            if last == 0:
                self._model.base_model(**arguments)
                logits = torch.empty(0, 0)
            else:
                logits = self._model(logits_to_keep=last, **arguments).logits[0, -last:]
        # A sliding-window layer drops what leaves its window, unless told to keep it for `rewind`.
        if first and hasattr(self._cache, "activate_past_recording"):
            self._cache.activate_past_recording()
        return logits

    def rewind(self, length: int) -> None:
        """Forget every token from position ``length`` on."""
        if self.length > length:
            self._cache.crop(length - self.length)
