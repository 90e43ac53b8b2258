"""Token ids into text, as they are generated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"  # decoders put it for bytes that are not, or not yet, a character
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")  # a token of one byte, in vocabularies of whole characters

_KEPT_TOKENS = 32  # of a window that slides; it slides at twice as many
_CLEANED_CHARACTERS = 8  # "do n ' t" becomes "don't": clean-up changes at most so many at the end


class Detokenizer:
    """The text of a growing list of tokens, equal to ``decode`` of all of them, in linear time.

    Decodes a window of the latest tokens. The first characters of a window can decode differently
    than inside the whole text (a leading space is stripped, a character is cut). A window therefore
    slides only to a place from which old and new window end in the same text.

    Args:
        tokenizer: Its special tokens are left out of the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._silent = {index for index, token in added.items() if token.special}
        self._cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._settled = ""  # text before that of the window
        self._start = 0  # of the window, in tokens
        self._front = 0  # characters of the window's text that belong to `_settled`, or to none
        self._decoded = self._due = 0  # tokens that `text` covers; tokens at which to decode next
        self._bytes_from: int | None = None  # where the text of the byte tokens at the end begins
        self.token_ids: list[int] = []
        self.text = ""

    def add(self, token: int) -> None:
        """Append one token; `text` may lag behind where the window is long, until `flush`."""
        if self._is_byte(token):
            if self._bytes_from is None:
                self.flush()
                self._bytes_from = len(self.text)
        elif self._has_text(token):
            self._bytes_from = None
        self.token_ids.append(token)
        if len(self.token_ids) >= self._due:
            self.flush()

    def flush(self) -> None:
        """Bring `text` up to date."""
        count = len(self.token_ids)
        if self._decoded == count:
            return
        window = self._decode(self._start)
        self.text = self._settled + window[self._front :]
        self._decoded = count
        if count - self._start >= 2 * _KEPT_TOKENS:
            self._slide(window)
        # A window that cannot slide is decoded at steps that grow with it, so that time is linear.
        self._due = count + max(1, (count - self._start) // (2 * _KEPT_TOKENS))

    @property
    def certain(self) -> int:
        """Leading characters of `text` that no later token can change."""
        end = len(self.text.rstrip(_UNFINISHED))
        if self._cleans:
            end = min(end, len(self.text) - _CLEANED_CHARACTERS)
        if self._bytes_from is not None:  # one wrong byte makes the whole run of them unreadable
            end = min(end, self._bytes_from)
        return max(end, 0)

    def _slide(self, window: str) -> None:
        start = len(self.token_ids) - _KEPT_TOKENS
        while start < len(self.token_ids) and not self._starts_window(self.token_ids[start]):
            start += 1
        shorter = self._decode(start)
        agreed = _common_end(window[self._front :], shorter)
        if agreed >= _CLEANED_CHARACTERS:
            self._settled += window[self._front : len(window) - agreed]
            self._start, self._front = start, len(shorter) - agreed

    def _decode(self, start: int) -> str:
        text: Any = self._tokenizer.decode(self.token_ids[start:], skip_special_tokens=True)
        return str(text)

    def _token(self, token: int) -> str | None:
        found: Any = self._tokenizer.convert_ids_to_tokens(token)
        return found if isinstance(found, str) else None

    def _is_byte(self, token: int) -> bool:
        return _BYTE.fullmatch(self._token(token) or "") is not None

    def _has_text(self, token: int) -> bool:
        return token not in self._silent and self._token(token) is not None

    def _starts_window(self, token: int) -> bool:
        """Whether a window may begin here: a run of byte tokens is decoded as a whole."""
        return self._has_text(token) and not self._is_byte(token)


class TextWriter:
    """Turns a growing list of tokens into chunks of text.

    A chunk never ends inside a character, nor inside what may yet become a stop string.

    Args:
        tokenizer: Of the tokens.
        stop: The text ends before the first of these strings; none is empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = stop
        self._given = 0
        self._searched = 0  # leading characters that hold no stop string, nor ever will
        self._end: int | None = None  # of the text, before a stop string

    @property
    def token_ids(self) -> list[int]:
        """All tokens."""
        return self._detokenizer.token_ids

    @property
    def text(self) -> str:
        """Their text, up to a stop string."""
        return self._detokenizer.text[: self._end]

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the text."""
        return self._end is not None

    def add(self, token: int) -> None:
        """Append one token; sets `stopped` if the text now holds a stop string."""
        self._detokenizer.add(token)
        self._search()

    def take(self) -> str:
        """Return the text that is certain and has not been returned yet."""
        if self._end is not None:
            return self._advance(self._end)
        text, certain = self._detokenizer.text, self._detokenizer.certain
        begun = [  # characters at the end that may be the beginning of a stop string
            count
            for stop in self._stop
            for count in range(1, len(stop))
            if text.endswith(stop[:count], 0, certain)
        ]
        return self._advance(certain - max(begun, default=0))

    def finish(self) -> str:
        """Return the rest."""
        self._detokenizer.flush()
        self._search()
        return self._advance(len(self.text))

    def _search(self) -> None:
        if self._end is not None:
            return
        text = self._detokenizer.text
        places = [text.find(stop, max(0, self._searched - len(stop) + 1)) for stop in self._stop]
        self._end = min((place for place in places if place >= 0), default=None)
        self._searched = self._detokenizer.certain

    def _advance(self, end: int) -> str:
        chunk = self._detokenizer.text[self._given : end]
        self._given = max(self._given, end)
        return chunk


def _common_end(first: str, second: str) -> int:
    """Return how many characters both end in."""
    pairs = zip(reversed(first), reversed(second), strict=False)
    differing = (place for place, (one, other) in enumerate(pairs) if one != other)
    return next(differing, min(len(first), len(second)))
