"""`write`: text from iterations, without a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from spmoe.decoding.generation import write
from spmoe.reporting.metrics import Course


@dataclass
class Iteration:
    tokens: list[int]
    drafted: int = 3

    @property
    def accepted(self) -> int:
        return len(self.tokens) - 1


class Writer:
    """A character a token; keeps the latest one back; stops before "!"."""

    def __init__(self) -> None:
        self.characters = ""
        self.given = 0

    @property
    def stopped(self) -> bool:
        return "!" in self.characters

    def add(self, token: int) -> None:
        self.characters += chr(token)

    def take(self) -> str:
        return self._advance(len(self.characters) - 1)

    def finish(self) -> str:
        return self._advance(len(self.characters))

    def _advance(self, end: int) -> str:
        end = max(min(end, (self.characters + "!").index("!")), self.given)
        chunk = self.characters[self.given : end]
        self.given = end
        return chunk


def iterations(*texts: str) -> Iterator[Iteration]:
    return (Iteration([ord(character) for character in text]) for text in texts)


@pytest.fixture
def course() -> Course:
    return Course(prompt_tokens=5)


def test_chunks_make_up_the_text_and_the_course_counts_it(course: Course) -> None:
    chunks = list(write(iterations("a", "bcd", "ef"), Writer(), {0}, course))
    assert chunks == ["abc", "de", "f"]
    assert (course.new_tokens, course.iterations) == (6, 3)
    assert (course.drafted, course.accepted) == (9, 3)
    assert course.finish_reason == "length"
    assert 0 < course.first_token_s < course.last_token_s


def test_an_end_token_ends_it_and_what_follows_is_neither_read_nor_counted(course: Course) -> None:
    left = iterations("ab", "cde", "never read")
    chunks = write(left, Writer(), {ord("d")}, course)
    assert "".join(chunks) == "abcd"
    assert (course.new_tokens, course.iterations, course.finish_reason) == (4, 2, "stop")
    assert next(left).tokens == [ord(character) for character in "never read"]


def test_a_stop_string_ends_it(course: Course) -> None:
    assert "".join(write(iterations("ab", "c!d"), Writer(), {0}, course)) == "abc"
    assert (course.new_tokens, course.finish_reason) == (4, "stop")


def test_nothing_written_is_no_chunk(course: Course) -> None:
    assert list(write(iterations(), Writer(), {0}, course)) == []
    assert (course.iterations, course.first_token_s) == (0, 0.0)
