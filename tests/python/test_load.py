"""`spmoe.load`: settings, steps, memory."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch

import spmoe
from spmoe import loader
from spmoe.costs.measure import make_profile
from spmoe.settings import LoadSettingNames, RuntimeSettingNames, Settings


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
        ({"policy": "bogus"}, r"policy is 'bogus' \(str\); use one of on-demand.*horizon"),
        ({"policy": None}, r"policy is None .* use one of"),
        ({"policy": ["horizon"]}, r"policy is \['horizon'\] \(list\); use one of"),
        ({"eviction": "bogus"}, r"eviction is 'bogus' \(str\); use one of auto, .*lru"),
        ({"device": "tpu"}, r'device "tpu" is not one of auto, host'),
        ({"dtype": "float8"}, r'dtype "float8" is not float32, bfloat16 or float16'),
        ({"dtype": torch.int8}, r'dtype "torch.int8" is not'),
        ({"link_gbps": -1.0}, r"link_gbps is -1.0 .* give a finite number of at least 0"),
        ({"link_gbps": float("inf")}, r"link_gbps is inf .* give a finite number"),
        ({"link_gbps": float("nan")}, r"link_gbps is nan .* give a finite number"),
        ({"link_gbps": 9e-7}, r"link_gbps is 9e-07 .* give 0 .* at least 1e-06"),
        ({"link_gbps": "1"}, r"link_gbps is '1' \(str\); give a finite number"),
        ({"trace_spans": -1}, r"trace_spans is -1 \(int\); give an integer from 0 to"),
        ({"trace_spans": 2**25}, r"trace_spans is 33554432 \(int\); give an integer from 0 to"),
        ({"trace_spans": 1.5}, r"trace_spans is 1.5 \(float\); give an integer"),
        ({"max_context": 0}, r"max_context is 0 \(int\); give an integer from 1 to"),
        ({"max_context": "4096"}, r"max_context is '4096' \(str\); give an integer"),
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


@pytest.mark.parametrize("wrong", [None, 5, b"model", ["model"], True])
def test_what_names_no_model_is_refused_before_a_model_is_read(tmp_path: Path, wrong: Any) -> None:
    calls = [
        ("target", lambda: spmoe.load(wrong)),
        ("target", lambda: spmoe.verify(wrong, None, ["Hi"])),
        ("target", lambda: make_profile(wrong, None)),
    ]
    if wrong is not None:
        calls.append(("draft", lambda: spmoe.load(tmp_path / "absent", wrong)))
    for name, call in calls:
        message = rf"{name} is .*{type(wrong).__name__}\); give a model's directory or its hub id"
        with pytest.raises(spmoe.InvalidArgument, match=message):
            call()


def test_settings_can_be_copied_but_not_changed() -> None:
    settings = Settings(device="auto", link_gbps=1.5)
    assert settings.device in ("host", "cuda:0")
    assert replace(settings, link_gbps=2.0) == Settings(device=settings.device, link_gbps=2.0)
    with pytest.raises(FrozenInstanceError):
        settings.link_gbps = 2.0
    with pytest.raises(spmoe.InvalidArgument, match="link_gbps is -1"):
        replace(settings, link_gbps=-1)


def test_every_setting_has_its_name_for_those_who_pass_them_on() -> None:
    of_runtime, of_load = RuntimeSettingNames.__annotations__, LoadSettingNames.__annotations__
    assert {field.name for field in fields(Settings)} == of_runtime.keys() | of_load.keys()
    settings_of_load = set(signature(spmoe.load).parameters) - {"target", "draft", "progress"}
    assert settings_of_load == of_load.keys()


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
