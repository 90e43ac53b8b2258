"""The decode loop over models that are tables: the text is the target's own."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import pytest
import torch

from spmoe.decoding import speculative

VOCABULARY = 7


class TableModel:
    """A causal model whose next token depends on the last two; remembers what it reads."""

    vocabulary_size = VOCABULARY
    context_length = 1000

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=generator)
        self.text: list[int] = []
        self.reads: list[int] = []

    @property
    def length(self) -> int:
        return len(self.text)

    def read(self, tokens: Sequence[int], *, last: int = 1) -> torch.Tensor:
        assert len(tokens) >= last >= 0
        self.reads.append(len(tokens))
        rows = []
        for token in tokens:
            before = self.text[-1] if self.text else 0
            self.text.append(token)
            rows.append(self.table[before, token])
        return torch.stack(rows)[len(rows) - last :]

    def rewind(self, length: int) -> None:
        del self.text[length:]

    def room(self, length: int) -> float:
        return math.inf


class Recurrent(TableModel):
    """Forgets down to where one of its passes began."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.begins: list[int] = []

    def read(self, tokens: Sequence[int], *, last: int = 1) -> torch.Tensor:
        self.begins.append(self.length)
        return super().read(tokens, last=last)

    def rewind(self, length: int) -> None:
        if length < self.length:
            del self.text[max(begin for begin in self.begins if begin <= length) :]
        self.begins = []


class Switching(TableModel):
    """Takes other values for all tokens of a pass that goes past a length."""

    def __init__(self, seed: int, switch: int) -> None:
        super().__init__(seed)
        self.switch = switch

    def read(self, tokens: Sequence[int], *, last: int = 1) -> torch.Tensor:
        logits = super().read(tokens, last=last)
        return -logits if self.length > self.switch else logits

    def room(self, length: int) -> float:
        return self.switch - length if length <= self.switch else math.inf


class Failing(TableModel):
    """A draft whose code fails at its third pass."""

    def read(self, tokens: Sequence[int], *, last: int = 1) -> torch.Tensor:
        if len(self.reads) == 2:
            raise RuntimeError("no third pass")
        return super().read(tokens, last=last)


class Noisy(TableModel):
    """A draft that agrees with the target's table about three times in four."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        generator = torch.Generator().manual_seed(seed + 1000)
        wrong = torch.rand(VOCABULARY, VOCABULARY, generator=generator) < 0.25
        self.table[wrong] = -self.table[wrong]


def write(
    seed: int,
    drafter: TableModel | None,
    draft_length: int,
    count: int,
    target: TableModel | None = None,
) -> list[int]:
    target = target or TableModel(seed)
    prompt = [1, 2, 3]
    text: list[int] = []
    for iteration in speculative.decode(
        target, drafter, prompt, draft_length=draft_length, max_length=len(prompt) + count
    ):
        text += iteration.tokens
        assert iteration.logits.argmax(-1).tolist() == iteration.tokens
        assert 0 <= iteration.accepted <= iteration.drafted <= draft_length
        # Both caches hold the text so far, less the token that is still to be read.
        assert target.text == [*prompt, *text][: len(target.text)]
        if not isinstance(target, Recurrent):
            assert target.length == len(prompt) + len(text) - 1
        if drafter is not None:
            assert drafter.text == [*prompt, *text][: drafter.length]
    return text


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("draft_length", [0, 1, 2, 4, 9])
def test_the_text_is_the_targets_own_whatever_is_drafted(seed: int, draft_length: int) -> None:
    expected = write(seed, None, 0, 40)
    assert len(expected) == 40
    for drafter in (TableModel(seed), Noisy(seed), TableModel(seed + 1)):
        assert write(seed, drafter, draft_length, 40) == expected


@pytest.mark.parametrize("count", range(1, 12))
def test_the_text_ends_exactly_where_it_must(count: int) -> None:
    assert len(write(3, TableModel(3), 4, count)) == count


def test_a_perfect_draft_gives_one_bonus_token_an_iteration() -> None:
    target = TableModel(5)
    iterations = list(
        speculative.decode(target, TableModel(5), [1], draft_length=3, max_length=1 + 1 + 8)
    )
    assert [len(iteration.tokens) for iteration in iterations] == [1, 4, 4]
    assert target.reads == [1, 4, 4]


def test_prefill_reads_the_prompt_in_one_pass() -> None:
    target = TableModel(0)
    next(speculative.decode(target, None, [1, 2, 3, 4], draft_length=0, max_length=9))
    assert target.reads == [4]


def test_the_draft_reads_each_token_of_the_text_once() -> None:
    drafter = TableModel(5)
    list(speculative.decode(TableModel(5), drafter, [1, 2], draft_length=3, max_length=11))
    # Prompt and first token, two proposals one by one; then first what was not read before.
    assert drafter.reads == [3, 1, 1, 2, 1, 1]


def test_an_iteration_has_the_drafts_passes_and_what_they_had_to_read_first() -> None:
    asked: list[tuple[int, int]] = []

    def lengths(unread: int, left: int) -> int:
        asked.append((unread, left))
        return 0 if len(asked) == 1 else 2

    drafter = TableModel(5)
    decoding = speculative.decode(
        TableModel(5),
        drafter,
        [1, 2, 3],
        draft_length=lengths,
        max_length=12,
        read_last=lambda: len(asked) == 3,
    )
    _, plain, *drafted = decoding
    assert (plain.unread, len(plain.pass_s)) == (3, 0)
    assert [(it.unread, len(it.pass_s)) for it in drafted] == [(4, 2), (1, 2), (0, 0)]
    assert drafter.reads == [5, 1, 2, 1, 1]  # its last token too, which is no pass
    assert asked == [(3, 8), (4, 7), (1, 4), (0, 1)]


def logits_choosing(*tokens: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(tokens), VOCABULARY).float()


@pytest.mark.parametrize(
    ("proposed", "choices", "accepted"),
    [
        ([], [4], [4]),
        ([1, 2], [1, 2, 3], [1, 2, 3]),
        ([1, 2], [1, 5, 3], [1, 5]),
        ([1, 2], [0, 2, 3], [0]),
    ],
)
def test_accept_takes_the_agreed_prefix_and_the_targets_next_token(
    proposed: list[int], choices: list[int], accepted: list[int]
) -> None:
    logits = logits_choosing(*choices)
    tokens, scores = speculative.accept([], proposed, logits)
    assert tokens == accepted
    assert torch.equal(scores, logits[: len(accepted)])


def test_accept_processes_each_row_with_its_own_prefix() -> None:
    seen: list[list[int]] = []

    def forbid_last(text: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append(list(text))
        return logits.index_fill(0, torch.tensor(text[-1]), -math.inf)

    logits = logits_choosing(3, 1, 1, 2)  # a token never follows itself once processed
    tokens, scores = speculative.accept([3], [0, 1, 5], logits, forbid_last)
    assert seen == [[3], [3, 0], [3, 0, 1]]
    assert tokens == [0, 1, 0]
    assert scores.argmax(-1).tolist() == tokens


class TestWhatADraftCannotDo:
    """A draft may change speed, never the text, and never end it."""

    COUNT = 40

    @pytest.mark.parametrize("seed", range(8))
    def test_a_token_that_it_does_not_have_ends_drafting(self, seed: int) -> None:
        drafter = Noisy(seed)
        drafter.vocabulary_size = 5
        expected = write(seed, None, 0, self.COUNT)
        text: list[int] = []
        for iteration in speculative.decode(
            TableModel(seed), drafter, [1, 2, 3], draft_length=3, max_length=3 + self.COUNT
        ):
            text += iteration.tokens
        assert text == expected
        assert max(drafter.text, default=0) < 5

    def test_it_proposes_no_token_that_only_it_has(self) -> None:
        drafter = TableModel(1)
        drafter.table[:, :, 6] += 100  # its favourite
        target = TableModel(1)
        target.vocabulary_size = 6
        target.table[:, :, 6] -= 100
        decoding = speculative.decode(target, drafter, [1], draft_length=3, max_length=20)
        accepted = sum(iteration.accepted for iteration in decoding)
        assert accepted > 0
        assert 6 not in drafter.text

    def test_the_end_of_its_context_ends_drafting(self) -> None:
        drafter = TableModel(3)
        drafter.context_length = 20
        expected = write(3, None, 0, self.COUNT)
        assert write(3, drafter, 4, self.COUNT) == expected
        assert sum(drafter.reads) > 10
        assert drafter.length <= 20

    def test_a_prompt_past_its_context_is_decoded_plainly(self) -> None:
        drafter = TableModel(3)
        drafter.context_length = 2
        assert write(3, drafter, 4, self.COUNT) == write(3, None, 0, self.COUNT)
        assert drafter.reads == []

    def test_a_failure_leaves_it_out_with_one_warning(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING, "spmoe"):
            assert write(2, Failing(2), 4, self.COUNT) == write(2, None, 0, self.COUNT)
        (record,) = caplog.records
        assert "the draft failed (RuntimeError: no third pass)" in record.getMessage()


class TestWhatATargetCannotDo:
    """The text is that of one token a pass, whatever the target's state allows."""

    @pytest.mark.parametrize("seed", range(8))
    @pytest.mark.parametrize("draft_length", [1, 4, 9])
    def test_a_state_that_is_rewound_further_is_read_again(
        self, seed: int, draft_length: int
    ) -> None:
        expected = write(seed, None, 0, 40)
        for drafter in (Noisy(seed), Recurrent(seed + 1)):
            target = Recurrent(seed)
            assert write(seed, drafter, draft_length, 40, target) == expected
            assert max(target.reads) <= 32

    def test_what_is_read_again_rides_along_with_the_next_verification(self) -> None:
        target = Recurrent(5)
        iterations = list(
            speculative.decode(target, TableModel(6), [1, 2], draft_length=2, max_length=9)
        )
        assert [it.rows for it in iterations[1:]] == target.reads[1:]
        assert len(target.reads) == len(iterations)  # no pass of its own
        rejected = [it for it in iterations[1:] if it.accepted < it.drafted]
        assert rejected
        assert sum(it.reread for it in iterations) > 0

    @pytest.mark.parametrize("switch", range(3, 12))
    def test_no_verification_straddles_a_length_that_changes_values(self, switch: int) -> None:
        expected = write(4, None, 0, 20, Switching(4, switch))
        for drafter in (TableModel(4), Noisy(4)):
            assert write(4, drafter, 4, 20, Switching(4, switch)) == expected


@pytest.mark.parametrize("chunk", [1, 3, 7, 8, 100])
def test_a_prompt_is_read_in_chunks(chunk: int) -> None:
    prompt = [1, 2, 3, 4, 5, 6, 0, 1]
    target = TableModel(0)
    first = next(
        speculative.decode(target, None, prompt, draft_length=0, max_length=20, prompt_chunk=chunk)
    )
    assert max(target.reads) <= chunk
    assert sum(target.reads) == len(prompt)
    expected = next(speculative.decode(TableModel(0), None, prompt, draft_length=0, max_length=20))
    assert first.tokens == expected.tokens
