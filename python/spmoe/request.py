"""One request, from prompt to text and figures."""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spmoe.config import check_draft_length
from spmoe.errors import Error, InvalidArgument
from spmoe.metrics import Metrics, Timing, summarise
from spmoe.models.text import Prompt
from spmoe.models.writer import TextWriter

log = logging.getLogger("spmoe")

if TYPE_CHECKING:
    from spmoe.engine import Engine


@dataclass(frozen=True, slots=True)
class Generation:
    """What a request wrote.

    Attributes:
        text: New text, without special tokens, up to a stop string if one ended it.
        token_ids: New token ids, with the end-of-text token if one ended it.
        stats: What it cost.
    """

    text: str
    token_ids: list[int]
    stats: Metrics

    @property
    def finish_reason(self) -> str:
        """Return "stop" (end-of-text token or stop string) or "length"."""
        return self.stats.finish_reason


class Request:
    """One request from prompt to figures."""

    def __init__(
        self,
        engine: Engine,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        draft_length: int | str | None = None,
        stop: str | Sequence[str] | None = None,
        raw: bool = False,
    ) -> None:
        self.max_new_tokens = _check_count(max_new_tokens)
        stops = _check_stop(stop)
        self.engine = engine
        self.prompt = engine.encode(prompt, raw=raw)
        self.draft_length = check_draft_length(
            engine.draft_length if draft_length is None else draft_length
        )
        self.writer = TextWriter(engine.tokenizer, stops)
        self.metrics: Metrics | None = None

    def run(self) -> Iterator[str]:
        """Yield chunks of text; the figures are there once it is exhausted or closed."""
        engine = self.engine
        ends = engine.target.end_token_ids
        finish_reason = "length"
        iterations = drafted = accepted = 0
        start = time.perf_counter()
        before = engine.runtime.stats()
        first = last = 0.0
        try:
            for iteration in engine.iterate(
                self.prompt, max_new_tokens=self.max_new_tokens, draft_length=self.draft_length
            ):
                last = time.perf_counter() - start
                first = first or last
                iterations += 1
                drafted += iteration.drafted
                accepted += iteration.accepted
                for token in iteration.tokens:
                    self.writer.add(token)
                    if token in ends or self.writer.stopped:
                        finish_reason = "stop"
                        break
                if chunk := self.writer.take():
                    yield chunk
                if finish_reason == "stop":
                    break
            chunk = self.writer.finish()
            if self.writer.stopped:
                finish_reason = "stop"
            if chunk:
                yield chunk
        finally:
            if iterations:
                self.metrics = engine.last = summarise(
                    before=before,
                    after=engine.runtime.stats(),
                    timing=Timing(first, last),
                    prompt_tokens=len(self.prompt),
                    new_tokens=len(self.writer.token_ids),
                    finish_reason=finish_reason,
                    drafted=drafted,
                    accepted=accepted,
                    iterations=iterations,
                    expert_memory_bytes=engine.runtime.expert_memory_bytes,
                    expert_total_bytes=engine.runtime.store.total_bytes,
                )
                log.info(
                    "%d tokens in %.2f s after a prompt of %d; %d of %d drafted were accepted",
                    len(self.writer.token_ids),
                    last,
                    len(self.prompt),
                    accepted,
                    drafted,
                )

    def result(self) -> Generation:
        """Return what was written; only after `run`."""
        if self.metrics is None:
            raise Error("the request wrote nothing")
        return Generation(self.writer.text, self.writer.token_ids, self.metrics)


def _check_count(max_new_tokens: Any) -> int:
    wrong = InvalidArgument(f"max_new_tokens must be a whole number, got {max_new_tokens!r}")
    if isinstance(max_new_tokens, bool):
        raise wrong
    try:
        count = operator.index(max_new_tokens)
    except TypeError:
        raise wrong from None
    if count < 1:
        raise InvalidArgument(f"max_new_tokens must be at least 1, got {count}")
    return count


def _check_stop(stop: Any) -> list[str]:
    """Return the stop strings; an empty one never stops a text."""
    if stop is None:
        return []
    several = isinstance(stop, Iterable) and not isinstance(stop, str)
    stops = list(stop) if several else [stop]
    if not all(isinstance(text, str) for text in stops):
        raise InvalidArgument(f"stop must be a string, several of them, or None, got {stop!r}")
    return [text for text in stops if text]
