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
        """Read ``tokens``; return the logits behind the ``last`` of them, [last, vocab]."""
        first = self.length == 0
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.tensor([list(tokens)], device=self._model.device),
                use_cache=True,
                logits_to_keep=last,
                **{self._cache_argument: self._cache},
            )
        # A sliding-window layer drops what leaves its window, unless told to keep it for `rewind`.
        if first and hasattr(self._cache, "activate_past_recording"):
            self._cache.activate_past_recording()
        logits: torch.Tensor = output.logits[0, -last:]
        return logits

    def rewind(self, length: int) -> None:
        """Forget every token from position ``length`` on."""
        if self.length > length:
            self._cache.crop(length - self.length)
