"""Settings that users write."""

from __future__ import annotations

from pathlib import Path

import pytest

from spmoe.config import check_draft_length, default_cache, format_bytes, parse_memory
from spmoe.errors import InvalidArgument

TOTAL = 1000 << 20


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("25%", 250 << 20),
        ("12.5 %", 125 << 20),
        ("6GiB", 6 << 30),
        ("6gib", 6 << 30),
        ("500MB", 500 * 10**6),
        ("4096", 4096),
        (4096, 4096),
        ("1.5k", 1536),
        ("200%", 2000 << 20),
    ],
)
def test_memory_is_a_share_a_size_or_bytes(text: int | str, expected: int) -> None:
    assert parse_memory(text, TOTAL) == expected


@pytest.mark.parametrize("text", ["", "much", "-1", "0", "0%", "5 apples", "%", "1e9", -5, "nan"])
def test_what_is_no_memory_is_refused_with_examples(text: int | str) -> None:
    with pytest.raises(InvalidArgument, match=r'is not an amount of memory.*"25%".*"6GiB"'):
        parse_memory(text, TOTAL)


@pytest.mark.parametrize("length", [-1, 32])
def test_a_draft_length_out_of_range_is_refused(length: int) -> None:
    with pytest.raises(InvalidArgument, match=rf"from 0 .* to 31, got {length}"):
        check_draft_length(length)


def test_bytes_are_shown_in_binary_units() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 5 << 20, 3 << 30, 2 << 40)] == [
        "0 bytes",
        "1023 bytes",
        "1.5 KiB",
        "5.0 MiB",
        "3.0 GiB",
        "2.0 TiB",
    ]


def test_tests_leave_the_cache_of_the_user_alone(user_cache: Path) -> None:
    assert default_cache() != user_cache


def test_the_cache_folder_is_the_users_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPMOE_CACHE", "/a")
    assert default_cache() == Path("/a")
    monkeypatch.delenv("SPMOE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert default_cache() == Path("/b/spmoe")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "spmoe"
