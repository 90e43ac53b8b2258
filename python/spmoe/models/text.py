"""Prompts into token ids."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from spmoe.errors import InvalidArgument
from spmoe.prompts import check_text

Tokenizer = PreTrainedTokenizerBase
Prompt = (
    str
    | Sequence[Mapping[str, Any]]
    | Sequence[SupportsIndex]
    | Mapping[str, Any]
    | torch.Tensor
    | np.ndarray[Any, Any]
)

_READ_KEYS = {"input_ids", "attention_mask", "token_type_ids"}  # of a tokenizer's output


def encode(tokenizer: Tokenizer, prompt: Prompt, *, raw: bool = False) -> list[int]:
    """Return the token ids of text, of chat messages, or as given.

    Args:
        tokenizer: The target's.
        prompt: Text, which becomes one user message if the tokenizer has a chat template; chat
            messages ({"role": ..., "content": ...}); or token ids: integers, a tensor or array,
            [tokens] or [1, tokens], or what the tokenizer returned (``input_ids`` of one text).
        raw: Text is read as it is.

    Raises:
        InvalidArgument: It is none of these, or the tokenizer has no chat template, or one that
            refuses the messages.
    """
    if isinstance(prompt, str):
        check_text(prompt)
        if raw or tokenizer.chat_template is None:
            ids: list[int] = tokenizer(prompt)["input_ids"]
            return ids
        return _encode_messages(tokenizer, [{"role": "user", "content": prompt}])
    if isinstance(prompt, Mapping):
        return _encode_output(prompt)
    if isinstance(prompt, (torch.Tensor, np.ndarray)):
        return _array_ids(prompt)
    if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
        raise InvalidArgument(
            "a prompt is text, a list of chat messages, or token ids; "
            f"got {type(prompt).__name__} {_shown(prompt)}"
        )
    items: list[Any] = list(prompt)
    if any(isinstance(item, Mapping) for item in items):
        return _encode_messages(tokenizer, items)
    if any(isinstance(item, str) for item in items):
        raise InvalidArgument(
            f"the prompt is a list of {len(items)} texts, but one is read at a time: give a text, "
            'or chat messages as {"role": "user", "content": "..."}'
        )
    return _row(items)


def _encode_output(output: Mapping[str, Any]) -> list[int]:
    """Return the ids that a tokenizer returned with masks."""
    if "input_ids" not in output:
        raise InvalidArgument(
            f"a mapping as prompt must have input_ids, got {', '.join(map(str, output))}; chat "
            "messages are given as a list, be it of one"
        )
    if unread := sorted(set(output) - _READ_KEYS):
        raise InvalidArgument(
            f"the prompt has {', '.join(unread)} beside input_ids, but only text is read: leave it "
            "out"
        )
    ids = _row(output["input_ids"])
    if output.get("attention_mask") is not None:
        _check_mask(output["attention_mask"], len(ids))
    return ids


def _check_mask(mask: Any, count: int) -> None:
    """Check that a mask of ``count`` tokens keeps all of them."""
    try:
        kept = torch.as_tensor(mask).bool()
    except (TypeError, ValueError, RuntimeError, OverflowError):  # no array of numbers
        kept = None
    if kept is None or kept.numel() != count:
        raise InvalidArgument(
            f"the prompt's attention_mask is {type(mask).__name__} {_shown(mask)}; give a 1 for "
            f"each of the {count} tokens, or leave it out"
        )
    if not kept.all():
        raise InvalidArgument(
            "the prompt's attention_mask leaves tokens out: give the tokens of one text, unpadded"
        )


def _row(ids: Any) -> list[int]:
    """Return one text's integers, given as [tokens] or [1, tokens], in an array or a list."""
    if isinstance(ids, (torch.Tensor, np.ndarray)):
        return _array_ids(ids)
    if not isinstance(ids, Sequence) or isinstance(ids, str):
        raise InvalidArgument(f"token ids are integers, got {type(ids).__name__} {_shown(ids)}")
    if ids and isinstance(ids[0], (Sequence, np.ndarray)) and not isinstance(ids[0], (str, bytes)):
        _check_batch(len(ids))
        return _row(ids[0])
    return [_token_id(item) for item in ids]


def _array_ids(array: torch.Tensor | np.ndarray[Any, Any]) -> list[int]:
    if isinstance(array, torch.Tensor):
        whole = not (array.is_floating_point() or array.is_complex() or array.dtype == torch.bool)
    else:
        whole = bool(np.issubdtype(array.dtype, np.integer))
    if not whole:
        raise InvalidArgument(
            f"token ids are integers, got {_kind(array)} of {array.dtype}; give int64"
        )
    if array.ndim == 2:
        _check_batch(array.shape[0])
        array = array[0]
    if array.ndim != 1:
        raise InvalidArgument(
            f"token ids must be [tokens] or [1, tokens], got {_kind(array)} of {list(array.shape)}"
        )
    ids: list[int] = array.tolist()
    return ids


def _check_batch(count: int) -> None:
    if count != 1:
        raise InvalidArgument(f"the prompt is a batch of {count} texts; give them one at a time")


def _token_id(item: Any) -> int:
    boolean = isinstance(item, (bool, np.bool_)) or (
        isinstance(item, torch.Tensor) and item.dtype == torch.bool
    )
    if not boolean:
        try:
            return operator.index(item)
        except TypeError:
            pass
    raise InvalidArgument(f"token ids are integers, got {type(item).__name__} {_shown(item)}")


def _encode_messages(tokenizer: Tokenizer, messages: list[Any]) -> list[int]:
    for number, message in enumerate(messages):
        _check_message(number, message)
    if tokenizer.chat_template is None:
        raise InvalidArgument(
            "chat messages given, but this model's tokenizer has no chat template; give text"
        )
    try:
        encoded: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )
        parts = [m["content"] for m in messages if isinstance(m.get("content"), list)]
        rendered: Any = tokenizer.apply_chat_template(messages, tokenize=False) if parts else ""
    except Exception as error:  # a template runs as a program of the model's author
        lines = str(error).strip().splitlines()
        raise InvalidArgument(
            f"this model's chat template refuses the messages ({type(error).__name__}: "
            f"{lines[0] if lines else ''}): change their roles or contents, or give the whole "
            "prompt as text with raw=True"
        ) from error
    if any(str(part) in rendered for part in parts):
        raise InvalidArgument(
            "this model's chat template does not read lists of content parts: give each "
            "message's content as one string"
        )
    return _row(encoded["input_ids"])


def _check_message(number: int, message: Any) -> None:
    where = f"chat message {number}"
    if not isinstance(message, Mapping):
        raise InvalidArgument(f"{where} is {type(message).__name__} {_shown(message)}, no mapping")
    if not isinstance(message.get("role"), str):
        raise InvalidArgument(
            f'{where} has no "role": give {{"role": "user", "content": "..."}}, or the role that '
            "the model's chat template knows"
        )
    content = message.get("content")
    if isinstance(content, str):
        check_text(content)
    elif isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise InvalidArgument(
                    f'{where} has a content part "{kind}", but only text is read: '
                    'give {"type": "text", "text": "..."}'
                )
            check_text(part["text"])
    elif content is not None or "tool_calls" not in message:
        found = "no content" if content is None else f"content of {type(content).__name__}"
        raise InvalidArgument(f'{where} has {found}: give "content" as a string')


def _kind(array: torch.Tensor | np.ndarray[Any, Any]) -> str:
    return "a tensor" if isinstance(array, torch.Tensor) else "an array"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
