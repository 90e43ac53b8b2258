"""Our own text of prose, code and chat, which routers and layer maps are fitted on."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

_SEPARATOR = "\n%%\n"
_DOCUMENT_TOKENS = 512  # longer documents are cut


def calibration_text() -> str:
    """Return the text; a line of %% separates documents."""
    return files("spmoe").joinpath("data", "calibration.txt").read_text(encoding="utf-8")


def tokenize_calibration(tokenizer: Any) -> list[list[int]]:
    """Return the token ids of each document.

    Args:
        tokenizer: A transformers tokenizer.
    """
    documents = calibration_text().split(_SEPARATOR)
    return [list(tokenizer(text)["input_ids"])[:_DOCUMENT_TOKENS] for text in documents]
