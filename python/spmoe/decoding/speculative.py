"""Speculative decoding, greedy: draft a few tokens, verify them in one pass of the target.

An iteration drafts g tokens, verifies g + 1 positions in one target pass, accepts the longest
prefix that the target itself would have written, and adds the target's next token, so that it
always advances by at least one. Every token is the argmax of the target's own scores.

Source: Leviathan et al., arXiv:2211.17192, in its greedy form; SP-MoE, arXiv:2510.10302, section 2.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from spmoe.decoding.cached_model import CachedModel
from spmoe.decoding.drafting import Drafting
from spmoe.models.processors import Process


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """The result of one iteration.

    Attributes:
        tokens: Token ids, at least one; the last was not drafted.
        logits: [len(tokens), vocab], the target's scores, whose argmax each token is.
        verify_s: Seconds that the target's pass took.
        end_s: When it ended, in seconds of `time.perf_counter`.
        drafted: Tokens that the draft proposed.
        probabilities: That the draft gave to each, if it was asked whether another is worth it.
        unread: Tokens that the draft's first pass read beside the one that every pass reads.
        pass_s: Seconds of each pass of the draft that proposed a token.
        draft_s: Seconds of drafting, all that it took.
        reread: Tokens that the target read again, because its state could not be rewound less.
        finite: Whether all of the target's logits were finite.
    """

    tokens: list[int]
    logits: torch.Tensor
    verify_s: float
    end_s: float
    drafted: int = 0
    probabilities: tuple[float, ...] = ()
    unread: int = 0
    pass_s: tuple[float, ...] = ()
    draft_s: float = 0.0
    reread: int = 0
    finite: bool = True

    @property
    def accepted(self) -> int:
        """Drafted tokens that the target accepted."""
        return len(self.tokens) - 1

    @property
    def rows(self) -> int:
        """Tokens that the target's pass read."""
        return self.reread + 1 + self.drafted


def prefill(model: CachedModel, prompt: Sequence[int], *, chunk: int | None = None) -> torch.Tensor:
    """Read the prompt; return the logits of the token after it, [1, vocab].

    Args:
        model: Fresh.
        prompt: Token ids.
        chunk: Tokens of a pass, to bound its memory; None reads all in one. One pass it is also
            where the prompt crosses a length that changes the values of a pass.
    """
    if chunk is None or model.room(0) < len(prompt):
        return model.read(prompt)
    for start in range(0, len(prompt) - chunk, chunk):
        model.read(prompt[start : start + chunk], last=0)
        model.rewind(model.length)  # nothing of the prompt will be forgotten
    return model.read(prompt[model.length :])


def verify(model: CachedModel, text: Sequence[int], proposed: Sequence[int]) -> torch.Tensor:
    """Read what is unread of the text, and all proposals, in one pass of the target.

    Args:
        model: The target, which has not read the last token of ``text`` at least.
        text: Token ids so far.
        proposed: g token ids.

    Returns:
        [g + 1, vocab]: row i is what follows the first i proposals.
    """
    return model.read([*text[model.length :], *proposed], last=len(proposed) + 1)


def accept(
    text: Sequence[int],
    proposed: Sequence[int],
    logits: torch.Tensor,
    process: Process | None = None,
) -> tuple[list[int], torch.Tensor]:
    """Return the proposals that the target agrees with and the target's token after them.

    Args:
        text: Token ids so far.
        proposed: g token ids.
        logits: [g + 1, vocab], from `verify`.
        process: Makes scores of a row of logits, from the text before that row.

    Returns:
        The tokens, and the scores [tokens, vocab] whose argmax each is.
    """
    if process is None:
        choices: list[int] = logits.argmax(dim=-1).tolist()
        agreed = 0
        while agreed < len(proposed) and proposed[agreed] == choices[agreed]:
            agreed += 1
        return choices[: agreed + 1], logits[: agreed + 1]
    tokens: list[int] = []
    scores: list[torch.Tensor] = []
    for row in logits:
        scores.append(process([*text, *tokens], row))
        tokens.append(int(scores[-1].argmax()))
        if tokens != list(proposed[: len(tokens)]):
            break
    return tokens, torch.stack(scores)


def decode(
    target: CachedModel,
    drafter: CachedModel | None,
    prompt: Sequence[int],
    *,
    draft_length: int | Callable[[int, int], int],
    max_length: int,
    worth_another: Callable[[Sequence[float]], bool] | None = None,
    read_last: Callable[[], bool] = lambda: False,
    process: Process | None = None,
    prompt_chunk: int | None = None,
) -> Iterator[Iteration]:
    """Write greedily after ``prompt`` until ``max_length``, an iteration at a time.

    The first iteration is the prefill and writes one token. The caller stops early by not asking
    for more. Both models' caches hold the same text, less what is still to be read, between
    iterations: what was rejected is rewound.

    A draft changes speed, never the text: where it cannot go on (its context ends, the text holds
    a token that it does not have, its pass fails), the target decodes plainly.

    Args:
        target: Fresh, nothing read.
        drafter: Fresh; None decodes plainly.
        prompt: At least one token id.
        draft_length: Tokens drafted an iteration, 0 for none, or a function that is asked before
            each, with a draft or without, for the draft's unread and how many tokens the
            iteration may write; fewer are drafted where the end is near.
        max_length: Tokens of prompt and text together.
        worth_another: As for `draft`.
        read_last: Whether the draft reads its own last token too, to predict experts for it.
        process: Makes scores of a row of the target's logits, from the text before that row.
        prompt_chunk: As for `prefill`.
    """
    text = list(prompt)
    start = time.perf_counter()
    logits = prefill(target, text, chunk=prompt_chunk)
    finite = _finite(logits)
    tokens, scores = accept(text, [], logits, process)
    text += tokens
    target.rewind(len(prompt))
    end = time.perf_counter()
    yield Iteration(tokens=tokens, logits=scores, verify_s=end - start, end_s=end, finite=finite)
    drafting = Drafting(target, drafter, process, worth_another, read_last)
    drafting.see(text)
    while len(text) < max_length:
        start = time.perf_counter()
        # The token of the target's own takes one of the places that are left.
        most = min(max_length - len(text) - 1, drafting.room(text))
        unread = drafting.unread(text)
        wanted = draft_length(unread, most + 1) if callable(draft_length) else draft_length
        proposed = drafting.propose(text, min(wanted, most))
        drafted = time.perf_counter()
        reread = len(text) - 1 - target.length
        logits = verify(target, text, proposed.tokens)
        finite = _finite(logits)
        tokens, scores = accept(text, proposed.tokens, logits, process)
        verified = time.perf_counter()
        text += tokens
        target.rewind(len(text) - 1)
        drafting.see(tokens)
        drafting.rewind(len(text) - 1)
        yield Iteration(
            tokens=tokens,
            logits=scores,
            drafted=len(proposed.tokens),
            probabilities=tuple(proposed.probabilities),
            unread=unread,
            pass_s=tuple(proposed.pass_s),
            draft_s=drafted - start,
            verify_s=verified - drafted,
            end_s=verified,
            reread=reread,
            finite=finite,
        )


def _finite(logits: torch.Tensor) -> bool:
    """Whether no logit is NaN or infinite; minus infinity masks a token and is allowed."""
    return math.isfinite(float(logits.max()))
