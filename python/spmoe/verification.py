"""Proof that the engine writes what the target alone writes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any, Literal

import torch

from spmoe import speculative
from spmoe.config import check_draft_length
from spmoe.loader import load
from spmoe.models.cached import CachedCausalLM
from spmoe.models.loading import load_plain, resolve_dtype
from spmoe.models.text import Prompt
from spmoe.progress import Progress, silent


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a run of the engine first leaves the target's own text.

    Attributes:
        prompt: Index of the prompt.
        run: "plain decoding" or "speculation".
        position: Index of the new token.
        expected: The target's own two likeliest tokens there, with logits.
        found: The engine's.
    """

    prompt: int
    run: str
    position: int
    expected: list[dict[str, Any]]
    found: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Verification:
    """The outcome: ``identical`` of ``total`` prompts gave the same tokens in all three runs."""

    identical: int
    total: int
    new_tokens: int
    dtype: str
    first_difference: Difference | None

    @property
    def proved(self) -> str:
        """Return what the runs show, in a sentence."""
        if self.identical == self.total:
            return "the engine's tokens are those of the target alone"
        return (
            "every token is the argmax of the target's own verification logits; in "
            f"{self.total - self.identical} of {self.total} texts they round differently from a "
            "pass of one token"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return all of it by name."""
        return asdict(self) | {"proved": self.proved}


@dataclass(frozen=True, slots=True)
class _Run:
    tokens: list[int]
    top_two: list[list[dict[str, Any]]]


def verify(
    target: str | PathLike[str],
    draft: str | PathLike[str] | None,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    draft_length: int | str = 4,
    expert_memory: int | str = "25%",
    policy: str = "horizon",
    eviction: str = "auto",
    dtype: torch.dtype | str | None = None,
    device: str = "auto",
    pinned_memory: int | str = "auto",
    progress: Progress | None = None,
) -> Verification:
    """Decode each prompt three ways and compare the tokens.

    First by the plain transformers model, its own eager experts, everything in memory; then by
    the engine without speculation; then with it. Needs memory for the whole target.

    Args:
        target: As for `load`.
        draft: As for `load`; None leaves the third run out.
        prompts: What to decode.
        max_new_tokens: Of each prompt; an end-of-text token ends a text sooner.
        draft_length: Tokens drafted an iteration.
        expert_memory: As for `load`.
        policy: As for `load`.
        eviction: As for `load`.
        dtype: As for `load`.
        device: As for `load`; the plain model runs on the host.
        pinned_memory: As for `load`.
        progress: Called after each text with a description, and done of total.
    """
    report = progress or silent
    total = len(prompts) * (3 if draft is not None else 2)
    done = itertools.count(1)

    length = check_draft_length(draft_length)
    with load(
        target,
        draft,
        expert_memory=expert_memory,
        draft_length=length,
        policy=policy,
        eviction=eviction,
        dtype=dtype,
        device=device,
        pinned_memory=pinned_memory,
    ) as engine:
        encoded = [engine.encode(prompt) for prompt in prompts]
        ends = engine.target.end_token_ids

        def run(iterations: Iterable[speculative.Iteration], description: str) -> _Run:
            result = _collect(iterations, ends)
            report(description, next(done), total)
            return result

        lengths: dict[str, int | Literal["auto"]] = {"plain decoding": 0}
        if draft is not None:
            lengths["speculation"] = length
        found = {
            name: [
                run(
                    engine.iterate(tokens, max_new_tokens=max_new_tokens, draft_length=drafted),
                    name,
                )
                for tokens in encoded
            ]
            for name, drafted in lengths.items()
        }
        context_length = engine.context_length

    plain = load_plain(target, dtype=resolve_dtype(dtype))
    expected = [
        run(
            speculative.decode(
                CachedCausalLM(plain),
                None,
                tokens,
                draft_length=0,
                max_length=min(len(tokens) + max_new_tokens, context_length),
            ),
            "the target alone",
        )
        for tokens in encoded
    ]
    differences = list(_differences(expected, found))
    return Verification(
        identical=len(prompts) - len({difference.prompt for difference in differences}),
        total=len(prompts),
        new_tokens=sum(len(run.tokens) for run in expected),
        dtype=str(resolve_dtype(dtype)).removeprefix("torch."),
        first_difference=differences[0] if differences else None,
    )


def _collect(iterations: Iterable[speculative.Iteration], ends: frozenset[int]) -> _Run:
    run = _Run([], [])
    for iteration in iterations:
        for token, logits in zip(iteration.tokens, iteration.logits, strict=True):
            run.tokens.append(token)
            run.top_two.append(speculative.top_two(logits))
            if token in ends:
                return run
    return run


def _differences(expected: list[_Run], found: dict[str, list[_Run]]) -> Iterator[Difference]:
    for prompt, own in enumerate(expected):
        for name, runs in found.items():
            pairs = itertools.zip_longest(own.tokens, runs[prompt].tokens)
            for position, (ours, theirs) in enumerate(pairs):
                if ours != theirs:
                    yield Difference(
                        prompt,
                        name,
                        position,
                        own.top_two[position] if position < len(own.top_two) else [],
                        runs[prompt].top_two[position] if theirs is not None else [],
                    )
                    break
