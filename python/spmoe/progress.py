"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # description, done, total


def silent(_description: str, _done: int, _total: int) -> None:
    """Tell nobody."""
