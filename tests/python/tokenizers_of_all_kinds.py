"""Small tokenizers of every kind of decoder that models ship."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
_WORDS = (
    "the",
    "do",
    "n",
    "t",
    "s",
    "ve",
    "re",
    "m",
    "cafe",
    "naïve",
    "日本",
    "語",
    "a",
    "b",
    "\n",
)
_POINTS = (".", ",", "!", "?", "'", "-")


def _wrap(tokenizer: Tokenizer, **settings: Any) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(list(_SPECIAL.values()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_SPECIAL, **settings)


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind: tokens of bytes, which may end inside a character."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    encoded = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = {character: index for index, character in enumerate(characters)}
    merges: list[tuple[str, str]] = []
    for text in (" the", " a", "日", "本", "🙂", "é"):
        whole = encoded.pre_tokenize_str(text)[0][0]
        for end in range(2, len(whole) + 1):
            vocabulary.setdefault(whole[:end], len(vocabulary))
            if (pair := (whole[: end - 1], whole[end - 1])) not in merges:
                merges.append(pair)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = encoded
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer)


def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama-2's and Mixtral's kind: words with leading spaces, and bytes for all else."""
    tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += ["▁", "\n", *_WORDS, *_POINTS, *(f"▁{word}" for word in _WORDS), "<unk>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return _wrap(tokenizer)


def unigram() -> PreTrainedTokenizerFast:
    """T5's kind: words with leading spaces, cleaned up."""
    tokens = [
        "▁",
        "\n",
        *_WORDS,
        *_POINTS,
        *(f"▁{part}" for part in (*_WORDS, *_POINTS)),
        "<unk>",
    ]
    scores = [(token, -float(len(tokens) - index)) for index, token in enumerate(tokens)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=len(tokens) - 1))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _wrap(tokenizer, clean_up_tokenization_spaces=True)


def word_piece() -> PreTrainedTokenizerFast:
    """BERT's kind: a space before every word, cleaned up."""
    tokens = ["[UNK]", *_WORDS, *_POINTS, *(f"##{word}" for word in _WORDS)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return _wrap(tokenizer, clean_up_tokenization_spaces=True)


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    make.__name__: make for make in (byte_level, byte_fallback, unigram, word_piece)
}
