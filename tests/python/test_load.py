"""`spmoe.load`: settings, steps, memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import spmoe
from spmoe import loader


def test_every_step_of_loading_is_reported_and_timed(target_path: Path) -> None:
    reported: list[tuple[str, int, int]] = []
    with spmoe.load(
        target_path,
        target_path,
        expert_memory="50%",
        progress=lambda *step: reported.append(step),
    ) as engine:
        assert set(engine.load_seconds) == {"target", "draft", "costs", "expert memory"}
        assert all(seconds > 0 for seconds in engine.load_seconds.values())
    done = [done for _, done, total in reported if total == 4]
    assert sorted(done) == done
    assert set(done) == {0, 1, 2, 3, 4}
    with spmoe.load(target_path, expert_memory="50%", policy="on-demand") as engine:
        assert set(engine.load_seconds) == {"target", "expert memory"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"expert_memory": "lots"}, r'expert_memory "lots" is not an amount.*"6GiB"'),
        ({"expert_memory": "9" * 400}, r"9+\.\.\. \(400 characters\).*is not an amount"),
        ({"expert_memory": 2**64}, r'expert_memory "18446744073709551616" is not an amount'),
        ({"expert_memory": float("nan")}, r'expert_memory "nan" is not an amount'),
        ({"expert_memory": None}, r'expert_memory "None" is not an amount'),
        ({"expert_memory": True}, r'expert_memory "True" is not an amount'),
        ({"pinned_memory": "some"}, r'pinned_memory "some" is not an amount'),
        ({"pinned_memory": 2**64}, r"pinned_memory .* is not an amount"),
        ({"draft_length": 32}, r"draft_length must be .* to 31, got 32"),
        ({"draft_length": "9" * 9999}, r"draft_length must be .* \(9999 characters\)"),
        ({"policy": "bogus"}, r'policy "bogus" is not one of .*on-demand.*horizon'),
        ({"policy": None}, r'policy "None" is not one of'),
        ({"eviction": "bogus"}, r'eviction "bogus" is not one of auto, .*lru'),
        ({"device": "tpu"}, r'device "tpu" is not one of auto, host'),
        ({"dtype": "float8"}, r'dtype "float8" is not float32, bfloat16 or float16'),
        ({"dtype": torch.int8}, r'dtype "torch.int8" is not'),
        ({"link_gbps": -1.0}, r"link_gbps must be 0 .* got -1.0"),
        ({"link_gbps": float("inf")}, r"link_gbps must be 0 .* got inf"),
        ({"link_gbps": float("nan")}, r"link_gbps must be 0 .* got nan"),
        ({"link_gbps": 9e-7}, r"link_gbps must be 0 .* at least 1e-06 .* got 9e-07"),
        ({"link_gbps": "1"}, r"link_gbps must be a number, got 1"),
        ({"trace_spans": -1}, r"trace_spans must be a whole number from 0 .* got -1"),
        ({"trace_spans": 2**25}, r"trace_spans must be a whole number"),
        ({"trace_spans": 1.5}, r"trace_spans must be a whole number .* got 1.5"),
        ({"max_context": 0}, r"max_context must be a whole number from 1 .* got 0"),
        ({"max_context": "4096"}, r"max_context must be a whole number"),
    ],
)
def test_every_setting_is_checked_before_a_model_is_read(
    tmp_path: Path, setting: dict[str, Any], message: str
) -> None:
    for call in (
        lambda: spmoe.load(tmp_path / "absent", **setting),
        lambda: spmoe.load(tmp_path / "absent", tmp_path / "absent too", **setting),
    ):
        with pytest.raises(spmoe.InvalidArgument, match=message):
            call()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("load_target", r"without its experts does not fit.*dtype=\"bfloat16\""),
        ("load_draft", r"the draft .* does not fit in memory .*use a smaller draft"),
        ("estimate", r"does not fit in memory \(torch is full\); lower expert_memory"),
    ],
)
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("torch is full"), MemoryError("torch is full")]
)
def test_every_step_that_is_out_of_memory_says_what_to_do(
    target_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    message: str,
    error: Exception,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(loader, name, fail)
    with pytest.raises(spmoe.OutOfMemory, match=message):
        spmoe.load(target_path, target_path, expert_memory="50%")
