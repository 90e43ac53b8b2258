"""The interface that decoding needs of a model with a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class CachedModel(Protocol):
    """A causal language model that remembers the tokens it has read."""

    @property
    def length(self) -> int:
        """Tokens read and remembered."""
        ...

    @property
    def vocabulary_size(self) -> int:
        """Token ids that it can read: 0 up to this."""
        ...

    @property
    def context_length(self) -> int:
        """Tokens that it can read in all."""
        ...

    def room(self, length: int) -> float:
        """Return how many tokens a pass may read behind ``length`` without changing their values.

        A pass of one token is always right.
        """
        ...

    def read(self, tokens: Sequence[int], *, last: int = 1) -> torch.Tensor:
        """Read ``tokens``; return the logits behind the ``last`` of them, [last, vocab].

        None are computed for 0.
        """
        ...

    def rewind(self, length: int) -> None:
        """Forget every token from position ``length`` on.

        `length` may be less afterwards, never more: a recurrent model forgets more than asked.
        """
        ...
