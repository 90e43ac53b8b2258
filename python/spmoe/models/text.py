"""Prompts into token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from spmoe.errors import InvalidArgument

Tokenizer = PreTrainedTokenizerBase
Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]


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
