"""Tokens into text: no piece ends inside a character or inside what may become a stop string."""

from __future__ import annotations

import pytest

from families import make_tokenizer
from spmoe.models.text import TextWriter


def write(text: str, *stop: str) -> tuple[list[str], TextWriter]:
    tokenizer = make_tokenizer()
    writer = TextWriter(tokenizer, stop)
    pieces = []
    for token in tokenizer(text)["input_ids"]:
        writer.add(token)
        pieces.append(writer.take())
        if writer.stopped:
            break
    pieces.append(writer.finish())
    return pieces, writer


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語 🙂 text", ""])
def test_pieces_make_up_the_text_and_hold_whole_characters(text: str) -> None:
    pieces, writer = write(text)
    assert "".join(pieces) == writer.text == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_what_may_become_a_stop_string_is_held_back() -> None:
    pieces, writer = write("one END two EN three", "END two END")
    assert "".join(pieces) == writer.text == "one END two EN three"
    given = ""
    for piece in pieces:
        given += piece
        assert not given.endswith("END two")


def test_the_text_ends_before_the_first_stop_string() -> None:
    pieces, writer = write("one two three", "three", "two")
    assert writer.stopped
    assert "".join(pieces) == writer.text == "one "


def test_an_unfinished_character_at_the_end_is_given_at_last() -> None:
    tokenizer = make_tokenizer()
    writer = TextWriter(tokenizer)
    for token in tokenizer("a🙂")["input_ids"][:-1]:
        writer.add(token)
        assert "\ufffd" not in writer.take()
    assert writer.finish().startswith("\ufffd")
