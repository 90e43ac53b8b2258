"""Proof that the engine writes what the target alone writes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any, Literal, Unpack

import torch

from spmoe.config import check_draft_length
from spmoe.decoding import speculative
from spmoe.errors import InvalidArgument
from spmoe.loader import load
from spmoe.models.loading import load_plain
from spmoe.models.reference import generate_alone
from spmoe.models.text import Prompt
from spmoe.reporting.progress import Progress, silent
from spmoe.settings import LoadSettingNames

_DRAFT_LENGTH = 4  # unless another is given: "auto" might draft nothing, and prove nothing of it
_LIKELIEST = 8  # scores kept of each row: a token further down is no near tie
# Steps of the dtype by which passes of other shapes may round differently, at the logits. Errors
# add up over a model's operations; float32 was seen 1e-4 off at recurrent layers.
_ROUNDING_STEPS = {torch.float32: 64}
_HALF_ROUNDING_STEPS = 8

Scored = dict[str, Any]  # {"token_id": ..., "logit": ...}


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a run of the engine first leaves the target's own text.

    Attributes:
        prompt: Index of the prompt.
        run: "plain decoding" or "speculation".
        position: Index of the new token.
        expected: The target's own two likeliest tokens there, with scores.
        found: The engine's.
        rounding: The scores of both tokens are so close, in both runs, that rounding in the dtype
            explains the difference. Otherwise it is a fault.
    """

    prompt: int
    run: str
    position: int
    expected: list[Scored]
    found: list[Scored]
    rounding: bool


@dataclass(frozen=True, slots=True)
class Verification:
    """The outcome: ``identical`` of ``total`` prompts gave the same tokens in all runs.

    Attributes:
        identical: Prompts whose texts are equal.
        total: Prompts.
        faults: Prompts with a difference that rounding does not explain.
        new_tokens: That the target alone wrote.
        drafted: Tokens that the draft proposed. Where it proposed none, nothing is proved of it.
        accepted: Of these, accepted.
        dtype: Of the activations.
        first_difference: A fault if there is one; None if there is no difference.
    """

    identical: int
    total: int
    faults: int
    new_tokens: int
    drafted: int
    accepted: int
    dtype: str
    first_difference: Difference | None

    @property
    def proved(self) -> str:
        """Return what the runs show, in a sentence."""
        if self.identical == self.total:
            return "the engine's tokens are those of the target alone"
        if self.faults:
            return (
                f"a fault: {self.faults} of {self.total} texts differ from the target's own by "
                "more than rounding can explain; please report it with the model's name"
            )
        return (
            "every token is the argmax of the target's own verification logits; in "
            f"{self.total - self.identical} of {self.total} texts two tokens are so nearly tied "
            "that a pass of another shape rounds the other way"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return all of it by name."""
        return asdict(self) | {"proved": self.proved}


@dataclass(slots=True)
class _Run:
    tokens: list[int]
    likeliest: list[list[Scored]]  # of each token's row of scores, best first
    drafted: int = 0
    accepted: int = 0


def verify(
    target: str | PathLike[str],
    draft: str | PathLike[str] | None,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    progress: Progress | None = None,
    **settings: Unpack[LoadSettingNames],
) -> Verification:
    """Decode each prompt three ways and compare the tokens.

    By the engine without speculation; by the engine with it; and by ``model.generate`` of the
    plain transformers model, its own eager experts, everything in memory. Needs memory for the
    whole target.

    Args:
        target: As for `load`.
        draft: As for `load`; None leaves the third run out.
        prompts: What to decode.
        max_new_tokens: Of each prompt; an end-of-text token ends a text sooner.
        progress: Called as things are loaded and after each text, with a description, and done of
            total.
        **settings: As for `load`, but ``draft_length`` is 4 unless given. The plain model runs on
            the host whatever the ``device``.

    Raises:
        InvalidArgument: There is no prompt, so that nothing would be proved, or the target's
            generation configuration asks for what spmoe does not apply; and as for `load`.
        CheckpointError: As for `load`.
        OutOfMemory: As for `load`.
        DeviceError: As for `load`.
    """
    if not prompts:
        raise InvalidArgument("no prompts given, so there is nothing to prove; give at least one")
    report = progress or silent
    total = len(prompts) * (3 if draft is not None else 2)
    done = itertools.count(1)

    length = check_draft_length(settings.setdefault("draft_length", _DRAFT_LENGTH))
    with load(target, draft, progress=progress, **settings) as engine:
        if ignored := engine.not_applied:
            raise InvalidArgument(
                f"generation_config.json of the target asks for {', '.join(ignored)}, which spmoe "
                "does not apply, so its texts are not those of generate; remove it to verify"
            )
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
        chosen = engine.target.model.dtype

    plain = load_plain(target, dtype=chosen)
    expected = []
    for tokens in encoded:
        count = min(max_new_tokens, context_length - len(tokens))
        new_tokens, scores = generate_alone(plain, tokens, count)
        expected.append(_Run(new_tokens, [_likeliest(row) for row in scores]))
        report("the target alone", next(done), total)
    speculated = found.get("speculation", [])
    differences = list(_differences(expected, found, chosen))
    faults = [difference for difference in differences if not difference.rounding]
    return Verification(
        identical=len(prompts) - len({difference.prompt for difference in differences}),
        total=len(prompts),
        faults=len({difference.prompt for difference in faults}),
        new_tokens=sum(len(run.tokens) for run in expected),
        drafted=sum(run.drafted for run in speculated),
        accepted=sum(run.accepted for run in speculated),
        dtype=str(chosen).removeprefix("torch."),
        first_difference=next(iter(faults + differences), None),
    )


def _collect(iterations: Iterable[speculative.Iteration], ends: frozenset[int]) -> _Run:
    run = _Run([], [])
    for iteration in iterations:
        run.drafted += iteration.drafted
        run.accepted += iteration.accepted
        for token, scores in zip(iteration.tokens, iteration.logits, strict=True):
            run.tokens.append(token)
            run.likeliest.append(_likeliest(scores))
            if token in ends:
                return run
    return run


def _likeliest(scores: torch.Tensor) -> list[Scored]:
    """Return the likeliest tokens of one row of scores."""
    values, ids = scores.float().topk(min(_LIKELIEST, len(scores)))
    return [
        {"token_id": token, "logit": value}
        for token, value in zip(ids.tolist(), values.tolist(), strict=True)
    ]


def _differences(
    expected: list[_Run], found: dict[str, list[_Run]], dtype: torch.dtype
) -> Iterator[Difference]:
    for prompt, own in enumerate(expected):
        for name, runs in found.items():
            other = runs[prompt]
            pairs = enumerate(itertools.zip_longest(own.tokens, other.tokens))
            position = next((at for at, (ours, theirs) in pairs if ours != theirs), None)
            if position is None:
                continue
            both = [run.likeliest[position : position + 1] for run in (own, other)]
            ours, theirs = (rows[0] if rows else [] for rows in both)
            yield Difference(
                prompt, name, position, ours[:2], theirs[:2], _is_rounding(ours, theirs, dtype)
            )


def _is_rounding(ours: list[Scored], theirs: list[Scored], dtype: torch.dtype) -> bool:
    """Whether two rows of scores prefer other tokens by no more than rounding can do."""
    if not ours or not theirs:
        return False  # one of the texts ended
    tokens = ours[0]["token_id"], theirs[0]["token_id"]
    for row in (ours, theirs):
        scores = {entry["token_id"]: entry["logit"] for entry in row}
        if not all(token in scores for token in tokens):
            return False
        first, second = (scores[token] for token in tokens)
        steps = _ROUNDING_STEPS.get(dtype, _HALF_ROUNDING_STEPS)
        if not abs(first - second) <= steps * _step(first, dtype):
            return False
    return True


def _step(value: float, dtype: torch.dtype) -> float:
    """Return the distance between neighbouring numbers of ``dtype`` at ``value``."""
    _, exponent = math.frexp(value)
    return math.ldexp(torch.finfo(dtype).eps, exponent - 1)
