"""Checkpoints that break, before loading and while text is being written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import spmoe
from families import make_dense_draft
from spmoe import _core

PROMPT = "Once upon a time"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture
def checkpoint(target_path: Path, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to break."""
    return Path(shutil.copytree(target_path, tmp_path / "checkpoint"))


def shard_of(checkpoint: Path, tensor: str = EXPERT) -> Path:
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    return checkpoint / index["weight_map"][tensor]


def truncate(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 2)


def flip_header(shard: Path) -> None:
    with shard.open("r+b") as file:
        file.seek(12)
        file.write(b"\xff\xfe")


def announce_too_much(shard: Path) -> None:
    with shard.open("r+b") as file:
        file.write((1 << 40).to_bytes(8, "little"))


def drop_tensor(shard: Path) -> None:
    tensors = load_file(shard)
    del tensors[EXPERT]
    save_file(tensors, shard, metadata={"format": "pt"})


def change_dtype(shard: Path) -> None:
    tensors = load_file(shard)
    tensors[EXPERT] = tensors[EXPERT].to(torch.float64)
    save_file(tensors, shard, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"model-\S+ is truncated.*download"),
        (flip_header, r"model-\S+ is damaged: its header is not JSON.*download"),
        (announce_too_much, r"model-\S+ is damaged.*header of 1099511627776 bytes.*download"),
        (drop_tensor, rf"{EXPERT} is missing.*download"),
        (change_dtype, r"F64"),
    ],
)
def test_a_damaged_shard_is_refused_before_anything_is_computed(
    checkpoint: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(shard_of(checkpoint))
    with pytest.raises(spmoe.CheckpointError, match=message):
        spmoe.load(checkpoint)


@pytest.mark.parametrize("place", [1, 2, 5, 17])
def test_a_read_error_fails_the_request_and_no_other(
    target_path: Path, faults: _core.FaultPlan, place: int
) -> None:
    with spmoe.load(target_path, target_path, expert_memory="50%", policy="on-demand") as engine:
        expected = engine.generate(PROMPT, max_new_tokens=8).token_ids
        faults.plant(fail_at_chunk=place)
        with pytest.raises(spmoe.DeviceError, match="read error injected"):
            engine.generate(PROMPT, max_new_tokens=8)
        for _ in range(2):
            assert engine.generate(PROMPT, max_new_tokens=8).token_ids == expected


def test_a_draft_of_another_vocabulary_is_refused(target_path: Path, tmp_path: Path) -> None:
    draft = make_dense_draft(tmp_path)
    file = draft / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(spmoe.InvalidArgument, match=r"another vocabulary .*use a draft of"):
        spmoe.load(target_path, draft)
