"""Whether a draft fits a target: a token id must mean the same to both."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from spmoe.errors import InvalidArgument

_CURE = "use a draft of the target's own model family, or none"


def check_pairing(
    target_tokenizer: PreTrainedTokenizerBase,
    draft_tokenizer: PreTrainedTokenizerBase,
    target_config: PreTrainedConfig,
    draft_config: PreTrainedConfig,
) -> None:
    """Check that the draft's tokens are the target's.

    Models may pad their embeddings past the vocabulary, each by as much as it likes. A beginning
    or padding token that only one of the tokenizers has is no difference either: neither is
    ever drafted.

    Args:
        target_tokenizer: Its token ids are what both models read.
        draft_tokenizer: The tokenizer that the draft was trained with.
        target_config: Of the target model.
        draft_config: Of the draft model.

    Raises:
        InvalidArgument: They differ; the message says in what.
    """
    target = {index: token for token, index in target_tokenizer.get_vocab().items()}
    draft = {index: token for token, index in draft_tokenizer.get_vocab().items()}
    _check_vocabularies(target, draft)
    _check_special_tokens(target_tokenizer, draft_tokenizer)
    for role, config in (("target", target_config), ("draft", draft_config)):
        size = int(config.get_text_config().vocab_size)
        if size <= max(target, default=0):
            raise InvalidArgument(
                f"the {role} model has {size} tokens (vocab_size), but its tokenizer gives ids up "
                f"to {max(target)}: the tokenizer is not this model's; copy the right one beside it"
            )


def _check_vocabularies(target: dict[int, str], draft: dict[int, str]) -> None:
    differing = sorted(
        index for index in target.keys() | draft.keys() if target.get(index) != draft.get(index)
    )
    if differing:
        first = differing[0]
        raise InvalidArgument(
            f"the draft has another vocabulary ({len(draft)} tokens, the target {len(target)}; "
            f"{len(differing)} ids differ): id {first} is {_shown(draft.get(first))} to the draft "
            f"and {_shown(target.get(first))} to the target; {_CURE}"
        )


def _check_special_tokens(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> None:
    for name, optional in (("eos", False), ("bos", True), ("pad", True)):
        wanted, found = (getattr(part, f"{name}_token_id") for part in (target, draft))
        if found != wanted and not (optional and None in (found, wanted)):
            raise InvalidArgument(
                f"the draft's {name} token is {_named(draft, found)}, the target's is "
                f"{_named(target, wanted)}; {_CURE}"
            )


def _shown(token: str | None) -> str:
    return "no token" if token is None else f'"{token}"'


def _named(tokenizer: PreTrainedTokenizerBase, index: int | None) -> str:
    return "none" if index is None else f'{index} ("{tokenizer.convert_ids_to_tokens(index)}")'
