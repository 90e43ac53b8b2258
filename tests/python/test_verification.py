"""`spmoe.verify`: what it calls identical, rounding, or a fault."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import spmoe
from spmoe.bench import verification

PROMPTS = ["Once upon a time", "A disk"]
BFLOAT16 = torch.bfloat16


def scored(**logits: float) -> list[dict[str, Any]]:
    """A row's likeliest tokens: names a, b, ... are ids 0, 1, ..."""
    row = [{"token_id": ord(name) - ord("a"), "logit": logit} for name, logit in logits.items()]
    return sorted(row, key=lambda entry: -entry["logit"])


def test_the_engine_is_compared_with_generate(target_path: Path, draft_path: Path) -> None:
    outcome = spmoe.verify(target_path, draft_path, PROMPTS, max_new_tokens=8, expert_memory="50%")
    assert (outcome.identical, outcome.total, outcome.faults) == (2, 2, 0)
    assert outcome.new_tokens == 16
    assert outcome.drafted > outcome.accepted >= 0
    assert outcome.proved == "the engine's tokens are those of the target alone"
    assert outcome.first_difference is None


def test_nothing_to_prove_is_an_error(target_path: Path) -> None:
    with pytest.raises(spmoe.InvalidArgument, match="nothing to prove; give at least one"):
        spmoe.verify(target_path, None, [])


def test_a_target_whose_settings_are_not_applied_is_refused(
    target_path: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(target_path, tmp_path / "target"))
    file = path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_beams": 4}))
    with pytest.raises(spmoe.InvalidArgument, match=r"num_beams=4.*remove it to verify"):
        spmoe.verify(path, None, PROMPTS, expert_memory="50%")


@pytest.mark.parametrize(
    ("ours", "theirs", "dtype", "rounding"),
    [
        # One step of bfloat16 at 24 is 0.125, and eight may be rounding; of float32 1.9e-6, and 64.
        (scored(a=24.5, b=24.375), scored(b=24.5, a=24.5), BFLOAT16, True),
        (scored(a=24.5, b=23.5), scored(b=24.5, a=24.5), BFLOAT16, True),
        (scored(a=24.5, b=23.25), scored(b=24.5, a=24.5), BFLOAT16, False),
        (scored(a=24.5, b=24.5), scored(b=24.5, a=23.25), BFLOAT16, False),
        (scored(a=24.5, b=24.375), scored(b=24.5, a=24.5), torch.float32, False),
        (scored(a=24.5, b=24.4999), scored(b=24.5, a=24.499999), torch.float32, True),
        (scored(a=24.5, b=24.4998), scored(b=24.5, a=24.499999), torch.float32, False),
        (scored(a=24.5, c=24.375), scored(b=24.5, a=24.5), BFLOAT16, False),  # b is far down
        (scored(a=24.5, b=-math.inf), scored(b=24.5, a=24.5), BFLOAT16, False),
        (scored(a=math.nan, b=24.5), scored(b=24.5, a=24.5), BFLOAT16, False),
        ([], scored(b=24.5, a=24.5), BFLOAT16, False),  # one of the texts ended
    ],
)
def test_rounding_is_named_only_where_the_dtype_allows_it(
    ours: list[dict[str, Any]], theirs: list[dict[str, Any]], dtype: torch.dtype, rounding: bool
) -> None:
    for first, second in ((ours, theirs), (theirs, ours)):
        assert verification._is_rounding(first, second, dtype) is rounding


def test_a_difference_that_rounding_cannot_make_is_called_a_fault(
    target_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = verification.generate_alone

    def other(*arguments: Any) -> tuple[list[int], torch.Tensor]:
        """The target alone, whose third token is another by far."""
        tokens, scores = alone(*arguments)
        best, second = scores[2].topk(2).indices.tolist()
        scores[2, second] = scores[2, best] + 1
        return [*tokens[:2], second, *tokens[3:]], scores

    monkeypatch.setattr(verification, "generate_alone", other)
    outcome = spmoe.verify(target_path, None, PROMPTS, max_new_tokens=6, expert_memory="50%")
    assert (outcome.identical, outcome.faults) == (0, 2)
    assert outcome.proved.startswith("a fault: 2 of 2 texts differ")
    assert "round" not in outcome.proved.replace("rounding can explain", "")
    difference = outcome.first_difference
    assert difference is not None
    assert (difference.position, difference.rounding) == (2, False)
