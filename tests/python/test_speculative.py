"""The decode loop over models that are tables: the text is the target's own."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from spmoe import speculative

VOCABULARY = 7


class TableModel:
    """A causal model whose next token depends on the last two; remembers what it reads."""

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


class Noisy(TableModel):
    """A draft that agrees with the target's table about three times in four."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        generator = torch.Generator().manual_seed(seed + 1000)
        wrong = torch.rand(VOCABULARY, VOCABULARY, generator=generator) < 0.25
        self.table[wrong] = -self.table[wrong]


def write(seed: int, drafter: TableModel | None, draft_length: int, count: int) -> list[int]:
    target = TableModel(seed)
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


def test_an_iteration_tells_the_drafts_passes_and_what_they_had_to_read_first() -> None:
    asked: list[tuple[int, int]] = []

    def lengths(backlog: int, left: int) -> int:
        asked.append((backlog, left))
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
    assert (plain.backlog, len(plain.pass_s)) == (3, 0)
    assert [(it.backlog, len(it.pass_s)) for it in drafted] == [(4, 2), (1, 2), (0, 0)]
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
    assert speculative.accept(proposed, logits_choosing(*choices)) == accepted
