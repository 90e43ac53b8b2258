"""Files of a loaded model that are removed, replaced or written to."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import spmoe
from families import make_checkpoint
from spmoe.errors import CheckpointChanged
from spmoe.models.loading import load_draft, load_plain, load_target

PROMPT = "Once upon a time"


@pytest.fixture
def checkpoint(target_path: Path, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to change."""
    return Path(shutil.copytree(target_path, tmp_path / "checkpoint"))


def text_of(engine: spmoe.Engine) -> list[int]:
    return list(engine.generate(PROMPT, max_new_tokens=8).token_ids)


def test_no_weight_stays_mapped_to_a_file(checkpoint: Path) -> None:
    loaded = [load_target(checkpoint), load_draft(checkpoint), load_plain(checkpoint)]
    mapped = [
        line for line in Path("/proc/self/maps").read_text().splitlines() if str(checkpoint) in line
    ]
    assert len(loaded) == 3
    assert not mapped


def test_a_shard_removed_or_replaced_after_loading_changes_nothing(
    checkpoint: Path, tmp_path: Path
) -> None:
    other = make_checkpoint("qwen3_moe", tmp_path / "other", seed=7)
    with spmoe.load(checkpoint, expert_memory="50%") as engine:
        expected = text_of(engine)
        for shard in other.glob("*.safetensors"):
            shard.rename(checkpoint / shard.name)
        assert text_of(engine) == expected
        shutil.rmtree(checkpoint)
        assert text_of(engine) == expected


def test_a_shard_truncated_after_loading_fails_every_request(checkpoint: Path) -> None:
    with spmoe.load(checkpoint, expert_memory="50%") as engine:
        text_of(engine)
        for shard in checkpoint.glob("*.safetensors"):
            os.truncate(shard, 16)
        for _ in range(2):
            with pytest.raises(
                CheckpointChanged, match=r"model-\S+ was written to.*now 16.*load the model again"
            ):
                text_of(engine)


def test_a_shard_overwritten_in_place_fails_every_request(checkpoint: Path) -> None:
    with spmoe.load(checkpoint, expert_memory="50%") as engine:
        shard = max(checkpoint.glob("*.safetensors"))
        written = shard.stat().st_mtime_ns
        with shard.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\0\0\0\0")
        os.utime(shard, ns=(written + 1, written + 1))  # later even where clocks are coarse
        with pytest.raises(spmoe.CheckpointError, match=rf"{shard.name} was written to"):
            text_of(engine)


def test_a_shard_truncated_within_a_request_fails_it(checkpoint: Path) -> None:
    with spmoe.load(checkpoint, expert_memory="25%", policy="on-demand") as engine:
        iterations = engine.iterate(PROMPT, max_new_tokens=20, draft_length=0)
        next(iterations)
        for shard in checkpoint.glob("*.safetensors"):
            os.truncate(shard, 16)
        with pytest.raises(spmoe.DeviceError, match=r"expert \d+ of layer \d+ .*truncated after"):
            list(iterations)


def test_a_drafts_files_may_change(target_path: Path, checkpoint: Path) -> None:
    with spmoe.load(target_path, checkpoint, expert_memory="50%", draft_length=3) as engine:
        expected = text_of(engine)
        for shard in checkpoint.glob("*.safetensors"):
            os.truncate(shard, 16)
        assert text_of(engine) == expected
