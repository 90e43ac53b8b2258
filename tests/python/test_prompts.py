"""Prompts of files: one a line, and a file that has none is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

import spmoe
from spmoe.prompts import read_prompts, select_prompts


def test_blank_lines_are_no_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Hello\n  \n\nnaïve\n", encoding="utf-8")
    assert [prompt.text for prompt in read_prompts(file)] == ["Hello", "naïve"]
    assert select_prompts(str(file)) == read_prompts(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no prompt; give one a line"),
        (b" \n\n", "has no prompt; give one a line"),
        (b"caf\xe9 noir", "is not UTF-8 text .byte 3: invalid continuation byte"),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(spmoe.InvalidArgument, match=message):
        select_prompts(str(file))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(spmoe.InvalidArgument, match="cannot be read: Is a directory"):
        read_prompts(tmp_path)
