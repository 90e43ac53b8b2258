"""Speculative decoding, greedy: draft a few tokens, verify them in one pass of the target.

An iteration drafts g tokens, verifies g + 1 positions in one target pass, accepts the longest
prefix that the target itself would have written, and adds the target's next token, so that it
always advances by at least one. Every token is the argmax of the target's own logits.

Source: Leviathan et al., arXiv:2211.17192, in its greedy form; SP-MoE, arXiv:2510.10302, section 2.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class CachedModel(Protocol):
    """A causal language model that remembers the tokens it has read."""

    @property
    def length(self) -> int:
        """Tokens read and remembered."""
        ...

    def read(self, tokens: Sequence[int], *, last: int = 1) -> torch.Tensor:
        """Read ``tokens``; return the logits behind the ``last`` of them, [last, vocab].

        None are computed for 0.
        """
        ...

    def rewind(self, length: int) -> None:
        """Forget every token from position ``length`` on."""
        ...


@dataclass(frozen=True, slots=True)
class Iteration:
    """What one iteration wrote.

    Attributes:
        tokens: Token ids, at least one; the last was not drafted.
        logits: [len(tokens), vocab], the target's, whose argmax each token is.
        drafted: Tokens that the draft proposed.
        probabilities: That the draft gave to each, if it was asked whether another is worth it.
        backlog: Tokens that the draft's first pass read beside the one that every pass reads.
        pass_s: Seconds of each pass of the draft that proposed a token.
        draft_s: Seconds of drafting, all that it took.
        verify_s: Seconds that the target's pass took.
        end_s: When it ended, in seconds of `time.perf_counter`.
    """

    tokens: list[int]
    logits: torch.Tensor
    drafted: int
    probabilities: tuple[float, ...]
    backlog: int
    pass_s: tuple[float, ...]
    draft_s: float
    verify_s: float
    end_s: float

    @property
    def accepted(self) -> int:
        """Drafted tokens that the target accepted."""
        return len(self.tokens) - 1


@dataclass(frozen=True, slots=True)
class Draft:
    """What a draft model proposes.

    Attributes:
        tokens: Token ids.
        pass_s: Seconds of each of its passes.
        probabilities: Of each token, by its own account; none if nobody asked.
    """

    tokens: list[int]
    pass_s: list[float]
    probabilities: list[float]


def prefill(model: CachedModel, prompt: Sequence[int]) -> torch.Tensor:
    """Read the prompt in one pass; return the logits of the token after it, [1, vocab]."""
    return model.read(prompt)


def draft(
    model: CachedModel,
    text: Sequence[int],
    count: int,
    *,
    worth_another: Callable[[Sequence[float]], bool] | None = None,
) -> Draft:
    """Let the draft model propose ``count`` tokens after ``text``.

    Reads only what of ``text`` it has not read yet. It does not read the last token it proposes.

    Args:
        model: The draft.
        text: Token ids so far.
        count: How many to propose at most.
        worth_another: Asked after every token, with the probability that the draft gives to each
            that it has proposed; drafting ends when it says no.
    """
    unread: Sequence[int] = text[model.length :]
    proposed: list[int] = []
    pass_s: list[float] = []
    probabilities: list[float] = []
    while len(proposed) < count:
        start = time.perf_counter()
        logits = model.read(unread)[-1]
        proposed.append(int(logits.argmax()))
        pass_s.append(time.perf_counter() - start)
        unread = proposed[-1:]
        if worth_another is not None:
            probabilities.append(float(logits.float().softmax(-1)[proposed[-1]]))
            if not worth_another(probabilities):
                break
    return Draft(proposed, pass_s, probabilities)


def verify(model: CachedModel, last: int, proposed: Sequence[int]) -> torch.Tensor:
    """Read the last token and all proposals in one pass of the target.

    Returns:
        [len(proposed) + 1, vocab]: row i is what follows the i-th of them.
    """
    return model.read([last, *proposed], last=len(proposed) + 1)


def accept(proposed: Sequence[int], logits: torch.Tensor) -> list[int]:
    """Return the proposals that the target agrees with, and the target's token after them.

    Args:
        proposed: g token ids.
        logits: [g + 1, vocab], from `verify`.
    """
    choices: list[int] = logits.argmax(dim=-1).tolist()
    agreed = 0
    while agreed < len(proposed) and proposed[agreed] == choices[agreed]:
        agreed += 1
    return choices[: agreed + 1]


def decode(
    target: CachedModel,
    drafter: CachedModel | None,
    prompt: Sequence[int],
    *,
    draft_length: int | Callable[[int, int], int],
    max_length: int,
    worth_another: Callable[[Sequence[float]], bool] | None = None,
    read_last: Callable[[], bool] = lambda: False,
) -> Iterator[Iteration]:
    """Write greedily after ``prompt`` until ``max_length``, an iteration at a time.

    The first iteration is the prefill and writes one token. The caller stops early by not asking
    for more. Both models' caches hold the same text, less what is still to be read, between
    iterations: what was rejected is rewound.

    Args:
        target: Fresh, nothing read.
        drafter: Fresh; None decodes plainly.
        prompt: At least one token id.
        draft_length: Tokens drafted an iteration, 0 for none, or a function that is asked before
            each, with a draft or without, and told the draft's backlog and how many tokens may
            still be written; fewer are drafted where the end is near.
        max_length: Tokens of prompt and text together.
        worth_another: As for `draft`.
        read_last: Whether the draft reads its own last token too, to predict experts for it.
    """
    text = list(prompt)
    start = time.perf_counter()
    logits = prefill(target, text)
    text += accept([], logits)
    end = time.perf_counter()
    yield Iteration(text[-1:], logits, 0, (), 0, (), 0.0, end - start, end)
    while len(text) < max_length:
        start = time.perf_counter()
        proposed = Draft([], [], [])
        left = max_length - len(text)
        backlog = len(text) - 1 - drafter.length if drafter is not None else 0
        wanted = draft_length(backlog, left) if callable(draft_length) else draft_length
        if drafter is not None:
            # The bonus token takes one of the places that are left.
            proposed = draft(drafter, text, min(wanted, left - 1), worth_another=worth_another)
            if proposed.tokens and read_last():
                drafter.read(proposed.tokens[-1:], last=0)
        drafted = time.perf_counter()
        logits = verify(target, text[-1], proposed.tokens)
        tokens = accept(proposed.tokens, logits)
        verified = time.perf_counter()
        text += tokens
        target.rewind(len(text) - 1)
        if drafter is not None:
            drafter.rewind(len(text) - 1)
        yield Iteration(
            tokens,
            logits[: len(tokens)],
            len(proposed.tokens),
            tuple(proposed.probabilities),
            backlog,
            tuple(proposed.pass_s),
            drafted - start,
            verified - drafted,
            verified,
        )


def top_two(logits: torch.Tensor) -> list[dict[str, Any]]:
    """Return the two likeliest tokens of one row of logits, for reports."""
    values, ids = logits.float().topk(2)
    return [
        {"token_id": int(token), "logit": float(value)}
        for token, value in zip(ids, values, strict=True)
    ]
