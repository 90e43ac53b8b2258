"""Prompts into token ids, and token ids into text, piece by piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from spmoe.errors import InvalidArgument

Tokenizer = PreTrainedTokenizerBase
Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]

_UNFINISHED = "\ufffd"  # the tokenizer's sign for half a character


def encode(tokenizer: Tokenizer, prompt: Prompt, *, raw: bool = False) -> list[int]:
    """Return the token ids of text, of chat messages, or as given.

    Args:
        tokenizer: The target's.
        prompt: Text, which becomes one user message if the tokenizer has a chat template; chat
            messages ({"role": ..., "content": ...}); or token ids.
        raw: Text goes in as it is.

    Raises:
        InvalidArgument: Messages are given and the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        if raw or tokenizer.chat_template is None:
            ids: list[int] = tokenizer(prompt)["input_ids"]
            return ids
        prompt = [{"role": "user", "content": prompt}]
    tokens = [item for item in prompt if isinstance(item, int)]
    if len(tokens) == len(prompt):
        return tokens
    if tokenizer.chat_template is None:
        raise InvalidArgument(
            "chat messages given, but this model's tokenizer has no chat template; give text"
        )
    messages: list[Any] = list(prompt)
    encoded: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True
    )
    return list(encoded["input_ids"])


class TextWriter:
    """Turns a growing list of tokens into pieces of text.

    A piece never ends inside a character, nor inside what may yet become a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._given = 0
        self.token_ids: list[int] = []
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> None:
        """Append one token; sets `stopped` if the text now holds a stop string."""
        self.token_ids.append(token)
        text: Any = self._tokenizer.decode(self.token_ids, skip_special_tokens=True)
        self.text = str(text)
        ends = [place for text in self._stop if (place := self.text.find(text)) >= 0]
        if ends:
            self.text = self.text[: min(ends)]
            self.stopped = True

    def take(self) -> str:
        """Return the text that is certain and has not been returned yet."""
        certain = len(self.text)
        if not self.stopped:
            certain = len(self.text.rstrip(_UNFINISHED))
            for text in self._stop:
                for part in range(len(text) - 1, 0, -1):
                    if self.text.endswith(text[:part]):
                        certain = min(certain, len(self.text) - part)
                        break
        return self._advance(certain)

    def finish(self) -> str:
        """Return the rest."""
        return self._advance(len(self.text))

    def _advance(self, end: int) -> str:
        piece = self.text[self._given : end]
        self._given = max(self._given, end)
        return piece
