"""The draft model's part of an iteration: propose a few tokens, as far as it can go."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from spmoe.config import MAX_ROWS
from spmoe.decoding.cached_model import CachedModel
from spmoe.models.processors import Process

log = logging.getLogger("spmoe")


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that a draft model proposes.

    Attributes:
        tokens: Token ids.
        pass_s: Seconds of each of its passes.
        probabilities: Of each token, by its own account; none if nobody asked.
    """

    tokens: list[int]
    pass_s: list[float]
    probabilities: list[float]


def draft(
    model: CachedModel,
    text: Sequence[int],
    count: int,
    *,
    vocabulary_size: int,
    process: Process | None = None,
    worth_another: Callable[[Sequence[float]], bool] | None = None,
) -> Draft:
    """Let the draft model propose ``count`` tokens after ``text``.

    Reads only what of ``text`` it has not read yet. It does not read the last token it proposes.

    Args:
        model: The draft.
        text: Token ids so far.
        count: How many to propose at most.
        vocabulary_size: Only ids under this are proposed.
        process: What is done to the target's logits; the draft's guesses follow it.
        worth_another: Asked after every token, with the probability that the draft gives to each
            that it has proposed; drafting ends when it says no.
    """
    unread: Sequence[int] = text[model.length :]
    proposed: list[int] = []
    pass_s: list[float] = []
    probabilities: list[float] = []
    while len(proposed) < count:
        start = time.perf_counter()
        logits = model.read(unread)[-1][:vocabulary_size]
        if process is not None:
            logits = process([*text, *proposed], logits)
        proposed.append(int(logits.argmax()))
        pass_s.append(time.perf_counter() - start)
        unread = proposed[-1:]
        if worth_another is not None:
            probabilities.append(float(logits.float().softmax(-1)[proposed[-1]]))
            if not worth_another(probabilities):
                break
    return Draft(proposed, pass_s, probabilities)


class Drafting:
    """Proposes tokens of one request, as long as the draft can.

    Args:
        target: Verifies what is proposed.
        drafter: The draft, nothing read; None proposes nothing.
        process: As for `draft`.
        worth_another: As for `draft`.
        read_last: Whether the draft reads its own last token too, to predict experts for it.
    """

    def __init__(
        self,
        target: CachedModel,
        drafter: CachedModel | None,
        process: Process | None,
        worth_another: Callable[[Sequence[float]], bool] | None,
        read_last: Callable[[], bool],
    ) -> None:
        self._target = target
        self._drafter = drafter
        self._process = None if process is None else partial(self._processed, process)
        self._worth_another = worth_another
        self._read_last = read_last

    def see(self, tokens: Sequence[int]) -> None:
        """Take note of tokens of the text: the draft cannot go past one that it does not have."""
        if self._drafter is not None and max(tokens) >= self._drafter.vocabulary_size:
            self._drafter = None

    def unread(self, text: Sequence[int]) -> int:
        """Return how many tokens its first pass reads beside the one that every pass reads."""
        return 0 if self._drafter is None else len(text) - 1 - self._drafter.length

    def room(self, text: Sequence[int]) -> int:
        """Return how many tokens may be drafted behind ``text``."""
        if self._drafter is None:
            return 0
        unread = len(text) - self._target.length
        return max(
            0,
            int(
                min(
                    MAX_ROWS - unread,
                    self._target.room(len(text)),
                    self._drafter.context_length - len(text),
                )
            ),
        )

    def propose(self, text: Sequence[int], count: int) -> Draft:
        """Return what the draft proposes; from its first failure on, nothing."""
        if self._drafter is None or count < 1:
            return Draft([], [], [])
        common = min(self._target.vocabulary_size, self._drafter.vocabulary_size)
        try:
            proposed = draft(
                self._drafter,
                text,
                count,
                vocabulary_size=common,
                process=self._process,
                worth_another=self._worth_another,
            )
            if self._read_last():
                self._drafter.read(proposed.tokens[-1:], last=0)
        except Exception as error:  # of the draft's code: the text goes on without it
            log.warning(
                "the draft failed (%s: %s); this text is decoded plainly from here",
                type(error).__name__,
                error,
            )
            self._drafter = None
            return Draft([], [], [])
        return proposed

    def _processed(
        self, process: Process, text: Sequence[int], logits: torch.Tensor
    ) -> torch.Tensor:
        """Process the draft's logits at the target's width, which processors count on."""
        missing = self._target.vocabulary_size - len(logits)
        return process(text, torch.nn.functional.pad(logits, (0, missing), value=-math.inf))

    def rewind(self, length: int) -> None:
        """Forget what was rejected."""
        if self._drafter is not None and self._drafter.length:
            self._drafter.rewind(min(length, self._drafter.length))
