"""Tokens into text: as `decode` of all of them gives it, in linear time, in whole characters."""

from __future__ import annotations

import random
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from families import make_tokenizer
from spmoe.models.writer import Detokenizer, TextWriter
from tokenizers_of_all_kinds import KINDS


def write(text: str, *stop: str) -> tuple[list[str], TextWriter]:
    tokenizer = make_tokenizer()
    writer = TextWriter(tokenizer, stop)
    chunks = []
    for token in tokenizer(text)["input_ids"]:
        writer.add(token)
        chunks.append(writer.take())
        if writer.stopped:
            break
    chunks.append(writer.finish())
    return chunks, writer


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語 🙂 text", ""])
def test_chunks_make_up_the_text_and_hold_whole_characters(text: str) -> None:
    chunks, writer = write(text)
    assert "".join(chunks) == writer.text == text
    assert not any("\ufffd" in chunk for chunk in chunks)


def random_tokens(tokenizer: PreTrainedTokenizerFast, seed: int) -> list[int]:
    """Text, noise, repetitions, special tokens, and tokens that have no text, in turn."""
    rng = random.Random(seed)
    texts = ("日本語 🙂 the text", "🙂" * 9, "do n ' t ' ' ' ' s", "the . a , b's", "' ")
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer) + 1]
    tokens: list[int] = []
    while len(tokens) < 220:
        count = rng.randint(1, rng.choice([3, 40]))
        kind = rng.randrange(4)
        if kind == 0:
            text = rng.choice(texts) * rng.randint(1, 6)
            tokens += tokenizer(text, add_special_tokens=False)["input_ids"]
        elif kind == 1:
            tokens += [rng.choice(special) for _ in range(count)]
        elif kind == 2:
            tokens += [rng.randrange(len(tokenizer))] * count
        else:
            tokens += [rng.randrange(len(tokenizer)) for _ in range(count)]
    return tokens


@pytest.mark.parametrize("kind", KINDS)
def test_text_equals_that_of_all_tokens_decoded_at_once(kind: str) -> None:
    tokenizer = KINDS[kind]()
    for seed in range(6):
        tokens = random_tokens(tokenizer, seed)
        writer, detokenizer = TextWriter(tokenizer), Detokenizer(tokenizer)
        written = ""
        for count, token in enumerate(tokens, 1):
            writer.add(token)
            written += writer.take()
            detokenizer.add(token)
            if count % 7 == 0:
                detokenizer.flush()
                expected = tokenizer.decode(tokens[:count], skip_special_tokens=True)
                assert detokenizer.text == expected, (kind, seed, count)
        written += writer.finish()
        assert written == writer.text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_byte_that_makes_a_long_run_of_bytes_unreadable_does_so_to_the_text() -> None:
    tokenizer = KINDS["byte_fallback"]()
    tokens = tokenizer("a" + "🙂" * 40, add_special_tokens=False)["input_ids"] + [0xFF]
    writer = TextWriter(tokenizer)
    written = ""
    for token in tokens:
        writer.add(token)
        written += writer.take()
    written += writer.finish()
    assert written == tokenizer.decode(tokens) == "a" + "\ufffd" * 161


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.decoded = 0

    def decode(self, tokens: list[int], **options: Any) -> str:
        self.decoded += len(tokens)
        return self._tokenizer.decode(tokens, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@pytest.mark.parametrize(
    ("kind", "text"),
    [("byte_level", "one two three. "), ("byte_fallback", "the a"), ("byte_fallback", "🙂")],
)
def test_decoded_tokens_grow_in_proportion_to_the_text(kind: str, text: str) -> None:
    def decoded(count: int) -> int:
        tokenizer = Counting(KINDS[kind]())
        tokens = tokenizer._tokenizer(text * count, add_special_tokens=False)["input_ids"][:count]
        assert len(tokens) == count
        writer = TextWriter(tokenizer, ("never",))
        for token in tokens:
            writer.add(token)
            writer.take()
        writer.finish()
        return tokenizer.decoded

    few, many = decoded(1000), decoded(4000)
    assert few < 1000 * 100
    assert many < 4.5 * few


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_string_far_into_a_text_is_found_across_tokens(kind: str) -> None:
    tokenizer = KINDS[kind]()
    tokens = tokenizer("a b the " * 60 + "do re the", add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(tokens)
    stop = whole[whole.index("do") : whole.index("do") + 4]
    writer = TextWriter(tokenizer, ("not there", stop))
    written = ""
    for token in tokens:
        writer.add(token)
        written += writer.take()
        if writer.stopped:
            break
    assert len(writer.token_ids) < len(tokens)
    assert written + writer.finish() == writer.text == whole[: whole.index(stop)]


def test_what_may_become_a_stop_string_is_held_back() -> None:
    chunks, writer = write("one END two EN three", "END two END")
    assert "".join(chunks) == writer.text == "one END two EN three"
    given = ""
    for chunk in chunks:
        given += chunk
        assert not given.endswith("END two")


def test_a_stop_string_with_a_character_of_several_bytes_is_held_back() -> None:
    chunks, writer = write("on the caféteria", "café")
    assert writer.stopped
    assert "".join(chunks) == writer.text == "on the "


def test_the_text_ends_before_the_first_stop_string() -> None:
    chunks, writer = write("one two three", "three", "two")
    assert writer.stopped
    assert "".join(chunks) == writer.text == "one "


def test_an_unfinished_character_at_the_end_is_given_at_last() -> None:
    tokenizer = make_tokenizer()
    writer = TextWriter(tokenizer)
    for token in tokenizer("a🙂")["input_ids"][:-1]:
        writer.add(token)
        assert "\ufffd" not in writer.take()
    assert writer.finish().startswith("\ufffd")
