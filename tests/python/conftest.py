"""Checkpoints that several test modules share; all tiny, random, and made on the fly."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import fake_cuda
from families import make_checkpoint, make_dense_draft
from planted_faults import planted_faults
from spmoe import _core
from spmoe.cli import main
from spmoe.config import default_cache
from spmoe.system.devices import cuda_status


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that needs a CUDA device where there is none; fail it if REQUIRE_CUDA=1."""
    if item.get_closest_marker("needs_fake_cuda") is not None and not fake_cuda.IS_ON:
        pytest.skip("runs in `make test-fake-cuda`")
    if item.get_closest_marker("needs_cuda") is None or fake_cuda.IS_ON:
        return
    count, reason = cuda_status()
    if not count:
        (pytest.fail if os.environ.get("REQUIRE_CUDA") == "1" else pytest.skip)(reason)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """For models so small, waking torch's other threads costs more than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fake_gpu() -> Iterator[Any]:
    """In `make test-fake-cuda`: the fake CUDA runtime of the GPU that the machine seems to have."""
    if not fake_cuda.IS_ON:
        yield None
        return
    with fake_cuda.cuda() as runtime:
        yield runtime


@pytest.fixture
def faults() -> Iterator[_core.FaultPlan]:
    """Faults in the links of the runtimes that the test opens."""
    with planted_faults() as plan:
        yield plan


@pytest.fixture(autouse=True, scope="session")
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's cache folder, which only tests of the built-in pair use: making it takes long.

    All others have an empty one, since a profile that was kept would change what engines do.
    """
    kept = default_cache()
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("SPMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield kept


@pytest.fixture(scope="session")
def target_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen3-MoE."""
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="session")
def draft_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer Llama of the same tokenizer, which agrees with the target about never."""
    return make_dense_draft(tmp_path_factory.mktemp("draft"))


@dataclass(frozen=True, slots=True)
class Outcome:
    """The exit status and the output of a command."""

    status: int
    out: str
    err: str


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Run the command line in this process, with environment variables as keywords."""

    def run(*arguments: object, **environment: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["spmoe", *map(str, arguments)])
        with monkeypatch.context() as changed:
            for name, value in environment.items():
                changed.setenv(name, value)
            with pytest.raises(SystemExit) as exit_:
                main()
        captured = capsys.readouterr()
        return Outcome(int(exit_.value.code or 0), captured.out, captured.err)

    return run
