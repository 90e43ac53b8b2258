"""A transformers causal language model with the cache of one sequence."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import DynamicCache, PreTrainedModel

from spmoe.models.snapshot import copied_state, restore_state
from spmoe.system.out_of_memory import out_of_memory

CausalLM = PreTrainedModel

_LESS_MEMORY = "lower expert_memory or shorten the prompt"

# The argument of a pass that is its cache: since transformers 5.24, before it, and in mamba before.
_CACHE_NAMES = ("cache", "past_key_values", "cache_params")


@dataclass(frozen=True, slots=True)
class CacheSupport:
    """The abilities of a model's cache; see `spmoe.models.cache_support`.

    Attributes:
        own_cache: The model makes a cache of its own class; a `DynamicCache` fits all others.
        rewind: How rejected tokens leave the cache: "crop" cuts them off; "restore" puts back a
            copy of the state from before they were read, which recurrent layers need; "restart"
            forgets the whole text.
        several: A pass of several tokens continues the text as passes of one token do. Otherwise
            tokens are read one by one.
        reason: Why "restart", or why one by one; empty where neither holds.
    """

    own_cache: bool
    rewind: Literal["crop", "restore", "restart"]
    several: bool
    reason: str = ""


class CachedCausalLM:
    """Reads tokens of one sequence and can forget the last of them; see `speculative`.

    Each pass gets the inputs that ``model.generate`` would give it. Rewinding is exact: continuing
    after it gives the bits of a cache that never read the rest.

    Args:
        model: In eval mode.
        support: What its cache can do, from `spmoe.models.cache_support.cache_support`.
    """

    def __init__(self, model: CausalLM, support: CacheSupport) -> None:
        self._model = model
        self._support = support
        parameters = inspect.signature(model.forward).parameters
        self._cache_name = next(
            (name for name in _CACHE_NAMES if name in parameters), _CACHE_NAMES[0]
        )
        self._can_keep = "logits_to_keep" in parameters
        self._takes_positions = "position_ids" in parameters
        self._cache: Any = self._new_cache()
        self._ids = torch.empty((1, 0), dtype=torch.long, device=model.device)
        self._states: list[tuple[int, dict[str, Any]]] = []  # (length, state), for "restore"
        self.context_length = context_length(model)
        embeddings: Any = model.get_input_embeddings()
        self.vocabulary_size = int(embeddings.num_embeddings)
        self._switches = _switches(model)

    @property
    def length(self) -> int:
        """Tokens read and remembered."""
        return int(self._ids.shape[1])

    def room(self, length: int) -> float:
        """Return how many tokens one pass may read behind ``length`` tokens of text.

        With more, the pass would give the first ``length`` tokens other values than ``generate``
        gives them (longrope switches its frequencies by the length that a pass reaches). The pass
        that reads the text again after such a switch has room for none: sliding windows of a new
        cache keep no past to rewind to.
        """
        if any(self.length <= switch < length for switch in self._switches):
            return 0
        later = [switch - length for switch in self._switches if switch >= length]
        return min(later, default=math.inf)

    @property
    def can_rewind(self) -> bool:
        """Whether `rewind` works, by the account of the cache itself; only after a first `read`."""
        return self._support.rewind != "crop" or bool(self._cache.is_croppable)

    def read(self, tokens: Sequence[int], *, last: int = 1) -> torch.Tensor:
        """Read ``tokens``; return the logits behind the ``last`` of them, [last, vocab].

        None are computed for 0.

        Raises:
            OutOfMemory: The pass does not fit in the memory of its device.
        """
        if self.length and not self._support.several:
            logits = [self._read([token], min(last, 1)) for token in tokens]
            return torch.cat(logits[len(logits) - last :]) if last else logits[-1]
        return self._read(tokens, last)

    def _read(self, tokens: Sequence[int], last: int) -> torch.Tensor:
        first = self.length == 0
        if not first and self._support.rewind == "restore":
            self._states.append((self.length, copied_state(self._cache)))
        new = torch.tensor([list(tokens)], dtype=torch.long, device=self._ids.device)
        self._ids = torch.cat([self._ids, new], dim=-1)
        what = f"a pass of {len(tokens)} tokens behind {self.length - len(tokens)}"
        with out_of_memory(what, _LESS_MEMORY), torch.inference_mode():
            output = self._pass(len(tokens), last, first=first)
        cache = getattr(output, self._cache_name)
        # A layer with a sliding window drops what leaves it, unless it is asked to keep the past.
        if cache is not self._cache or first:
            self._cache = cache
            if self._support.rewind == "crop":
                cache.activate_past_recording()
        return output.logits[0, -last:] if last else torch.empty(0, 0)

    def _pass(self, count: int, last: int, *, first: bool) -> Any:
        prepare: Any = self._model.prepare_inputs_for_generation
        inputs = prepare(
            self._ids,
            next_sequence_length=count,
            use_cache=True,
            is_first_iteration=first,
            **self._positions(),
            **{self._cache_name: self._cache},
        )
        if last == 0:
            decoder: Any = self._model.base_model
            return decoder(**inputs)
        if self._can_keep:
            inputs["logits_to_keep"] = last
        return self._model(**inputs)

    def _positions(self) -> dict[str, torch.Tensor]:
        """Return the positions of all tokens: not every cache knows its length."""
        if not self._takes_positions:
            return {}
        return {"position_ids": torch.arange(self.length, device=self._ids.device)[None]}

    def rewind(self, length: int) -> None:
        """Forget every token from position ``length`` on.

        A model with recurrent layers may forget some before it too: `length` says what it still
        remembers, and the rest has to be read again.
        """
        if self._support.rewind == "crop":
            self._cache.crop(min(0, length - self.length))
        elif length < self.length:
            kept = [(at, state) for at, state in self._states if at <= length]
            if kept:
                length, state = kept[-1]
                restore_state(self._cache, state)
            else:
                length, self._cache = 0, self._new_cache()
        self._states.clear()
        self._ids = self._ids[:, :length]

    def _new_cache(self) -> Any:
        return None if self._support.own_cache else DynamicCache(config=_text_config(self._model))


def _text_config(model: CausalLM) -> Any:
    return model.config.get_text_config(decoder=True)


def context_length(model: CausalLM) -> int:
    """Return how many tokens the model can read; `sys.maxsize` where its configuration is silent.

    Recurrent models have no end.
    """
    length = getattr(_text_config(model), "max_position_embeddings", None)
    return sys.maxsize if length is None else int(length)


def _switches(model: CausalLM) -> list[int]:
    """Return the lengths past which rotary embeddings take other frequencies in a pass."""
    config = _text_config(model)
    parameters: Any = getattr(config, "rope_parameters", None) or {}
    sets = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    lengths = [
        part.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        for part in sets
        if part.get("rope_type") == "longrope"
    ]
    return sorted({int(length) for length in lengths if length})
