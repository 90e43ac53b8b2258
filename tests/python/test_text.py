"""Prompts: what a transformers user passes is read; all else is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

import spmoe
from families import make_tokenizer
from spmoe.models.text import encode

IDS = [72, 101, 108]
MESSAGE = {"role": "user", "content": "Hi"}
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)
ADDING = "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}"
PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
)


def tokens(prompt: Any, template: str | None = STRICT) -> list[int]:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return encode(tokenizer, prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        IDS,
        tuple(IDS),
        [IDS],
        [np.int64(i) for i in IDS],
        list(torch.tensor(IDS)),
        torch.tensor(IDS),
        torch.tensor([IDS], dtype=torch.int32),
        np.array(IDS, dtype=np.uint16),
        np.array([IDS]),
        [np.array(IDS)],
        {"input_ids": IDS},
        BatchEncoding({"input_ids": [IDS], "attention_mask": [[1, 1, 1]]}),
        {
            "input_ids": torch.tensor([IDS]),
            "attention_mask": torch.ones(1, 3, dtype=torch.bool),
            "token_type_ids": torch.zeros(1, 3),
        },
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_token_ids_in_every_form(prompt: Any) -> None:
    found = tokens(prompt)
    assert found == IDS
    assert all(type(token) is int for token in found)


def test_the_output_of_a_tokenizer_is_read_in_every_format() -> None:
    tokenizer = make_tokenizer()
    for options in ({}, {"return_tensors": "pt"}, {"return_tensors": "np"}):
        assert tokens(tokenizer("Hel", **options)) == tokenizer("Hel")["input_ids"]


def test_messages_go_through_the_template() -> None:
    tokenizer = make_tokenizer()
    expected = tokenizer("[user]Hi")["input_ids"]
    assert tokens([MESSAGE]) == expected
    assert tokens((MESSAGE,)) == expected
    assert tokens("Hi") == expected
    assert encode(tokenizer, "[user]Hi", raw=True) == expected
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert tokens([{"role": "user", "content": parts}], PARTS) == expected


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "got NoneType None"),
        (5, "got int 5"),
        (b"text", r"got bytes b'text'"),
        ({1, 2}, r"got set \{1, 2\}"),
        (iter(IDS), "got list_iterator"),
        ([True, False], "token ids are integers, got bool True"),
        ([np.True_], "token ids are integers, got bool"),
        ([1.0, 2.0], "token ids are integers, got float 1.0"),
        ([1, None], "token ids are integers, got NoneType None"),
        ([torch.tensor(1.5)], "token ids are integers, got Tensor"),
        ([torch.tensor(True)], "token ids are integers, got Tensor"),
        ("a\ud800b", r"not valid Unicode: character 1 is a lone surrogate \(U\+D800\)"),
        (["one", "two"], "a list of 2 texts, but one is read at a time"),
        (torch.ones(3), "got a tensor of torch.float32; give int64"),
        (torch.ones(3, dtype=torch.bool), "got a tensor of torch.bool"),
        (np.ones(3, dtype=complex), "got an array of complex128"),
        (torch.ones(2, 3, dtype=torch.int64), "a batch of 2 texts"),
        (torch.ones(0, 3, dtype=torch.int64), "a batch of 0 texts"),
        (torch.tensor(5), r"must be \[tokens\] or \[1, tokens\], got a tensor of \[\]"),
        (torch.ones(1, 1, 3, dtype=torch.int64), r"got a tensor of \[1, 1, 3\]"),
        ([IDS, IDS], "a batch of 2 texts"),
        (MESSAGE, "must have input_ids, got role, content; chat messages are given as a list"),
        ({"input_ids": [IDS], "attention_mask": [[0, 1, 1]]}, "attention_mask leaves tokens out"),
        ({"input_ids": IDS, "attention_mask": "111"}, "attention_mask is str '111'; give a 1 for"),
        ({"input_ids": IDS, "attention_mask": {"a": 1}}, "attention_mask is dict .* 3 tokens"),
        ({"input_ids": IDS, "attention_mask": [[1], [1, 1]]}, "attention_mask is list"),
        ({"input_ids": IDS, "attention_mask": [1 << 80] * 3}, "attention_mask is list"),
        (
            {"input_ids": IDS, "attention_mask": [1]},
            r"list \[1\]; give a 1 .*or leave it out",
        ),
        ({"input_ids": "Hel"}, "token ids are integers, got str 'Hel'"),
        ({"input_ids": [IDS], "pixel_values": []}, "has pixel_values beside input_ids"),
        ([MESSAGE, 3], "chat message 1 is int 3"),
        ([{"content": "Hi"}], 'chat message 0 has no "role"'),
        ([{"role": 5, "content": "Hi"}], 'chat message 0 has no "role"'),
        ([{"role": "user"}], "chat message 0 has no content"),
        ([{"role": "user", "content": 5}], "chat message 0 has content of int"),
        ([{"role": "user", "content": "\udcff"}], "not valid Unicode"),
        ([{"role": "system", "content": "Hi"}], "refuses the messages.*no system role.*raw=True"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
            'content part "image", but only text is read',
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
            "does not read lists of content parts",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_anything_else_is_refused_by_name(prompt: Any, message: str) -> None:
    with pytest.raises(spmoe.InvalidArgument, match=message):
        tokens(prompt)


def test_whatever_a_template_raises_is_translated() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    for template in (
        ADDING,
        "{{ messages[3].role }}",
        "{{ unknown() }}",
        "{% for %}",
        "{{ 1 / 0 }}",
    ):
        with pytest.raises(spmoe.InvalidArgument, match="chat template refuses the messages"):
            tokens(parts, template)


def test_messages_without_a_template_are_refused() -> None:
    with pytest.raises(spmoe.InvalidArgument, match="has no chat template; give text"):
        tokens([MESSAGE], None)
