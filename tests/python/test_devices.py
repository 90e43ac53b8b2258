"""Which device computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import spmoe
from spmoe.config import parse_memory
from spmoe.system import devices


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two devices; the list says what is wrong with each, at first nothing."""
    problems = ["", ""]
    monkeypatch.setattr(devices._core, "cuda_status", lambda: (2, ""))
    monkeypatch.setattr(devices._core, "cuda_device_problem", lambda index: problems[index])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return problems


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cuda_status", lambda: (0, "the driver is gone"))


@pytest.mark.parametrize("name", ["host", "cpu"])
def test_the_host_needs_no_cuda(no_gpu: None, name: str) -> None:
    assert devices.resolve_device(name) == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)]
)
def test_cuda_has_an_index(two_gpus: list[str], name: str, index: int) -> None:
    device = devices.resolve_device(name)
    assert device == torch.device("cuda", index)
    assert devices.native_name(device) == f"cuda:{index}"


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_card_that_spmoe_cannot_use_is_passed_over(two_gpus: list[str], name: str) -> None:
    two_gpus[0] = "cuda:0 (Old) has compute capability 7.5"
    assert devices.cuda_status() == (2, "")
    assert devices.resolve_device(name) == torch.device("cuda", 1)
    with pytest.raises(spmoe.DeviceError, match=r'"cuda:0" asked: cuda:0 \(Old\) has compute'):
        devices.resolve_device("cuda:0")


def test_cards_none_of_which_can_be_used_are_none(two_gpus: list[str]) -> None:
    two_gpus[:] = ["cuda:0 (Old) is old", "cuda:1 (Old) is old"]
    assert devices.cuda_status() == (0, "cuda:0 (Old) is old")
    assert devices.resolve_device("auto") == torch.device("cpu")
    with pytest.raises(spmoe.DeviceError, match=r'"cuda" asked: cuda:0 \(Old\) is old'):
        devices.resolve_device("cuda")


def test_auto_is_the_host_without_cuda(no_gpu: None) -> None:
    device = devices.resolve_device("auto")
    assert device == torch.device("cpu")
    assert devices.native_name(device) == "host"


@pytest.mark.parametrize("seen_by", ["torch", "driver"])
def test_auto_says_why_it_leaves_a_gpu_alone(
    no_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    seen_by: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen_by == "torch")
    driver = tmp_path / "version"
    monkeypatch.setattr(devices, "_NVIDIA_DRIVER", driver)
    if seen_by == "driver":
        driver.touch()
    assert devices.resolve_device("auto") == torch.device("cpu")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "a GPU is here, but everything runs on the host: the driver is gone" in caplog.text
    caplog.clear()
    assert devices.resolve_device("host") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    driver.unlink(missing_ok=True)
    assert devices.resolve_device("auto") == torch.device("cpu")
    assert not caplog.records


def test_cuda_that_cannot_be_used_is_refused_with_the_reason(no_gpu: None) -> None:
    with pytest.raises(spmoe.DeviceError, match='device "cuda" asked: the driver is gone'):
        devices.resolve_device("cuda")


def test_an_index_past_the_last_is_refused(two_gpus: list[str]) -> None:
    with pytest.raises(spmoe.DeviceError, match="the CUDA devices here are cuda:0 to cuda:1"):
        devices.resolve_device("cuda:2")


@pytest.mark.parametrize("name", ["", "tpu", "cuda:", "cuda:-1", "cuda:x", "autocuda"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(spmoe.InvalidArgument, match="is not one of auto, host, cuda"):
        devices.resolve_device(name)


def test_a_torch_without_cuda_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices._core, "cuda_status", lambda: (1, ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    count, reason = devices.cuda_status()
    assert count == 0
    assert f"torch {torch.__version__} cannot use CUDA" in reason


@pytest.mark.parametrize(
    ("text", "expected"), [(0, 0), ("0", 0), ("50%", 500), ("100", 100), ("1KiB", 1024)]
)
def test_pinned_memory_is_nothing_or_an_amount(text: int | str, expected: int) -> None:
    assert parse_memory(text, 1000, setting="pinned_memory", least=0) == expected


@pytest.mark.parametrize("text", ["much", "-1", ""])
def test_pinned_memory_that_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(spmoe.InvalidArgument, match='give "auto", 0, a share'):
        parse_memory(text, 1000, setting="pinned_memory", least=0)
