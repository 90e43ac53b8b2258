"""The lossless property: whatever is drafted, tokens are those of `model.generate`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

import spmoe
from families import ALL_FAMILIES, make_checkpoint
from spmoe.models.loading import load_plain
from spmoe.models.reference import generate_alone

PROMPT = list(b"Once upon a time there was a disk")
NEW_TOKENS = 24
# In transformers, a pass of several tokens of these starts from an empty recurrent state.
PLAIN_FAMILIES = {"jamba"}


def alone(path: Path, prompt: list[int] = PROMPT, count: int = NEW_TOKENS) -> list[int]:
    return generate_alone(load_plain(path), prompt, count)[0]


def written(
    engine: spmoe.Engine,
    draft_length: int,
    prompt: list[int] = PROMPT,
    count: int = NEW_TOKENS,
) -> tuple[list[int], int, int]:
    """The new tokens, up to an end-of-text token; how many were drafted, and accepted."""
    result = engine.generate(prompt, max_new_tokens=count, draft_length=draft_length)
    return result.token_ids, result.stats.drafted, result.stats.accepted


def spoil(engine: spmoe.Engine, tokens: list[int]) -> None:
    """Let the draft, a copy of the target, never propose the rarer half of ``tokens``."""
    by_count = [token for token, _ in Counter(tokens).most_common()]
    with torch.no_grad():
        engine.draft.get_output_embeddings().weight[by_count[(len(by_count) + 1) // 2 :]] = 0


@pytest.mark.parametrize("family", sorted(ALL_FAMILIES.keys() - PLAIN_FAMILIES))
def test_tokens_are_those_of_generate(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_checkpoint(family, tmp_path)
    expected = alone(path)
    with spmoe.load(path, path, expert_memory="50%") as engine:
        assert written(engine, 0) == (expected, 0, 0)
        tokens, drafted, accepted = written(engine, 4)
        assert tokens == expected
        assert accepted > 0.9 * drafted > 0
        spoil(engine, expected)
        drafted = accepted = 0
        for draft_length in (1, 4, 9):
            tokens, *counts = written(engine, draft_length)
            assert tokens == expected, draft_length
            drafted, accepted = drafted + counts[0], accepted + counts[1]
        assert accepted > 0
        assert accepted < drafted or len(set(expected)) == 1
        assert engine.runtime.calibration()  # predictions were made, and none failed
    assert not [record for record in caplog.records if record.name == "spmoe"]


@pytest.mark.parametrize("family", sorted(PLAIN_FAMILIES))
def test_a_target_whose_state_cannot_continue_decodes_plainly(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_checkpoint(family, tmp_path)
    with spmoe.load(path, path, expert_memory="50%") as engine:
        assert written(engine, 4) == (alone(path), 0, 0)
        assert "rejected tokens cannot leave the target's cache" in engine.draft_note
    warnings = [record for record in caplog.records if record.name == "spmoe"]
    assert len(warnings) == 1
