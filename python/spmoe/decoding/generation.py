"""From iterations to text: chunks as they are written, until an end token or a stop string."""

from __future__ import annotations

import operator
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spmoe.errors import InvalidArgument
from spmoe.reporting.metrics import Course, Metrics

if TYPE_CHECKING:
    from spmoe.decoding.speculative import Iteration
    from spmoe.models.writer import TextWriter


@dataclass(frozen=True, slots=True)
class Generation:
    """The text of a request.

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


def write(
    iterations: Iterable[Iteration], writer: TextWriter, ends: Collection[int], course: Course
) -> Iterator[str]:
    """Yield the text of iterations in chunks, none of them empty.

    Args:
        iterations: Read until a token of ``ends`` or a stop string of the writer ends the text; the
            tokens behind it are dropped.
        writer: New.
        ends: End-of-text tokens; one belongs to the text that it ends.
        course: Kept up to date while the text is written. Its seconds count from here.
    """
    start = time.perf_counter()
    for iteration in iterations:
        course.last_token_s = time.perf_counter() - start
        course.first_token_s = course.first_token_s or course.last_token_s
        course.iterations += 1
        course.drafted += iteration.drafted
        course.accepted += iteration.accepted
        for token in iteration.tokens:
            writer.add(token)
            course.new_tokens += 1
            if token in ends or writer.stopped:
                course.finish_reason = "stop"
                break
        if chunk := writer.take():
            yield chunk
        if course.finish_reason == "stop":
            break
    chunk = writer.finish()
    if writer.stopped:
        course.finish_reason = "stop"
    if chunk:
        yield chunk


def check_max_new_tokens(max_new_tokens: Any) -> int:
    """Return the number of tokens that a text may have.

    Raises:
        InvalidArgument: It is no whole number, or under 1.
    """
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


def check_stop(stop: Any) -> list[str]:
    """Return the stop strings; an empty one never stops a text.

    Raises:
        InvalidArgument: It is neither a string, several of them, nor None.
    """
    if stop is None:
        return []
    several = isinstance(stop, Iterable) and not isinstance(stop, str)
    stops = list(stop) if several else [stop]
    if not all(isinstance(text, str) for text in stops):
        raise InvalidArgument(f"stop must be a string, several of them, or None, got {stop!r}")
    return [text for text in stops if text]
