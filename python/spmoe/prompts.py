"""Prompts of our own writing, shipped for `spmoe verify` and for benches."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class Prompt:
    """A user's message.

    Attributes:
        name: Short and unique.
        kind: "code", "question", "story", "list", or "long" (more than 1,500 tokens).
        text: The message, without chat template.
    """

    name: str
    kind: str
    text: str


def load_prompts() -> list[Prompt]:
    """Return the 20 prompts: code, questions, stories, lists, and last a very long one."""
    text = files("spmoe").joinpath("data", "prompts.json").read_text(encoding="utf-8")
    return [Prompt(**entry) for entry in json.loads(text)]
