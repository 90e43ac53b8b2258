"""A draft fits a target when a token id means the same to both."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, PreTrainedTokenizerFast

from families import PADDED_VOCABULARY, VOCABULARY, make_tokenizer
from spmoe.decoding.pairing import check_pairing
from spmoe.errors import InvalidArgument


def check(
    draft: PreTrainedTokenizerFast,
    *,
    target_size: int = PADDED_VOCABULARY,
    draft_size: int = PADDED_VOCABULARY,
) -> None:
    check_pairing(
        make_tokenizer(),
        draft,
        LlamaConfig(vocab_size=target_size),
        LlamaConfig(vocab_size=draft_size),
    )


def test_the_same_tokenizer_fits_whatever_the_embeddings_are_padded_to() -> None:
    check(make_tokenizer())
    check(make_tokenizer(), target_size=VOCABULARY, draft_size=VOCABULARY + 100)
    check(make_tokenizer(), target_size=VOCABULARY + 100, draft_size=VOCABULARY)


def test_a_longer_vocabulary_is_refused_with_the_first_difference() -> None:
    draft = make_tokenizer()
    draft.add_tokens(["<tool>", "<end_tool>"])
    with pytest.raises(
        InvalidArgument,
        match=rf"{VOCABULARY + 2} tokens, the target {VOCABULARY}; 2 ids differ\): id {VOCABULARY} "
        'is "<tool>" to the draft and no token to the target; use a draft of',
    ):
        check(draft)


def test_another_order_of_tokens_is_refused_with_the_first_difference() -> None:
    state = make_tokenizer().backend_tokenizer.to_str().replace('"!":0', '"!":1')
    draft = PreTrainedTokenizerFast(
        tokenizer_object=type(make_tokenizer().backend_tokenizer).from_str(
            state.replace('"\\"":1', '"\\"":0')
        ),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    with pytest.raises(InvalidArgument, match=r'2 ids differ.*id 0 is """ to the draft and "!" to'):
        check(draft)


@pytest.mark.parametrize(("name", "text"), [("eos", "</s>"), ("bos", "<s>"), ("pad", "<pad>")])
def test_another_special_token_is_refused(name: str, text: str) -> None:
    draft = make_tokenizer()
    setattr(draft, f"{name}_token", "A")
    index = make_tokenizer().convert_tokens_to_ids(text)
    with pytest.raises(
        InvalidArgument, match=rf"draft's {name} token is \d+ \(\"A\"\), the target's is {index} "
    ):
        check(draft)


def test_a_missing_end_token_is_refused_and_a_missing_padding_token_is_not() -> None:
    draft = make_tokenizer()
    draft.pad_token = None
    check(draft)
    draft.eos_token = None
    with pytest.raises(InvalidArgument, match=r"eos token is none, the target's is 257"):
        check(draft)


@pytest.mark.parametrize("role", ["target", "draft"])
def test_a_model_smaller_than_its_tokenizer_is_refused(role: str) -> None:
    with pytest.raises(
        InvalidArgument, match=rf"the {role} model has 256 tokens.*ids up to {VOCABULARY - 1}"
    ):
        check(make_tokenizer(), **{f"{role}_size": 256})
