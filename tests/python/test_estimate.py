"""Rough costs as a model is loaded: little is read, and the runtime is as new afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import spmoe
from spmoe import loader
from spmoe.costs import estimate as module
from spmoe.costs.costs import Costs
from spmoe.costs.estimate import estimate
from spmoe.models.loading import load_draft, load_target
from spmoe.runtime import POLICIES, Runtime

COUNTERS = ("hits", "late", "misses", "link_bytes", "link_busy_s", "iterations", "resident")


@pytest.fixture(scope="module")
def target(target_path: Path) -> Any:
    return load_target(target_path)


@pytest.fixture(scope="module")
def draft(target_path: Path) -> Any:
    return load_draft(target_path)


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that the link has moved before each reset."""
    counted: list[int] = []
    reset = Runtime.reset

    def spy(self: Runtime) -> None:
        counted.append(self.stats(by_layer=False)["link_bytes"])
        reset(self)

    monkeypatch.setattr(Runtime, "reset", spy)
    return counted


@pytest.mark.parametrize("policy", POLICIES)
def test_under_every_policy_the_runtime_is_as_new_afterwards(
    target: Any, draft: Any, policy: str
) -> None:
    with target.open_runtime(expert_memory="40%", policy=policy) as runtime:
        new = runtime.stats(), runtime.calibration()
        costs = estimate(target, draft, runtime)
        assert isinstance(costs, Costs)
        assert costs.draft_s > 0
        assert all(seconds > 0 for seconds in costs.copy_s.values())
        assert costs.expert_bytes == runtime.store.blob_bytes
        assert (runtime.stats(), runtime.calibration()) == new


@pytest.mark.parametrize("expert_memory", ["13%", "40%", "100%"])
@pytest.mark.parametrize("blobs", [1, 6, 1000])
def test_no_more_is_read_than_the_limit(
    target: Any, draft: Any, moved: list[int], expert_memory: str, blobs: int
) -> None:
    limit = blobs * target.store.blob_bytes
    with target.open_runtime(expert_memory=expert_memory, policy="sp-moe") as runtime:
        estimate(target, draft, runtime, limit_bytes=limit, limit_s=60)
    # One of each cost that has none yet: a copy, a batch, and what a prefetch takes.
    assert 0 < sum(moved) <= max(limit, 3 * target.store.blob_bytes)


def test_no_sample_begins_once_time_is_spent_but_the_first_of_each(
    target: Any, draft: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    sample = module._Meter.sample

    def spy(self: Any, sampler: Iterator[float]) -> float:
        taken.append(sampler.gi_code.co_name)  # type: ignore[attr-defined]
        return sample(self, sampler)

    monkeypatch.setattr(module._Meter, "sample", spy)
    with target.open_runtime(expert_memory="40%", policy="horizon") as runtime:
        estimate(target, draft, runtime, limit_s=0.0)
        assert taken == ["copies", "draft_steps", "draft_tokens", "losses"]
        taken.clear()
        estimate(target, None, runtime, limit_s=0.0)
        assert taken == ["copies", "losses"]


def test_a_slow_link_demands_one_expert_at_a_time(target: Any, moved: list[int]) -> None:
    blob = target.store.blob_bytes
    with target.open_runtime(
        expert_memory="100%", policy="on-demand", link_gbps=blob / 0.3e9
    ) as runtime:
        costs = estimate(target, None, runtime)  # 0.3 s an expert
    assert set(costs.copy_s) == {1}
    assert costs.copy_s[1] >= 0.3 * 0.95
    assert sum(moved) <= 5 * blob


def test_prefetches_take_something_under_policies_that_prefetch(target: Any, moved: Any) -> None:
    for policy in ("sp-moe", "horizon"):
        moved.clear()
        with target.open_runtime(expert_memory="40%", policy=policy) as runtime:
            estimate(target, None, runtime, limit_s=60)
        batches = len(moved)
        assert sum(bool(size) for size in moved) > batches / 2  # copies and prefetches alike


def test_load_measures_on_the_runtime_that_is_then_used(
    target_path: Path, monkeypatch: pytest.MonkeyPatch, moved: list[int]
) -> None:
    opened: list[Runtime] = []
    init = Runtime.__init__

    def spy(self: Runtime, *arguments: Any, **options: Any) -> None:
        opened.append(self)
        init(self, *arguments, **options)

    monkeypatch.setattr(Runtime, "__init__", spy)
    reported: list[str] = []
    with spmoe.load(
        target_path,
        target_path,
        expert_memory="50%",
        progress=lambda description, *_: reported.append(description),
    ) as engine:
        assert opened == [engine.runtime]
        assert sum(moved) > 0
        total = engine.stats()["total"]
        assert {name: total[name] for name in COUNTERS} == dict.fromkeys(COUNTERS, 0)
        assert engine.planner is not None
        assert engine.planner.costs.draft_s > 0
    assert "estimating costs, 1 of 8" in reported


def test_a_load_that_fails_late_gives_its_memory_back(
    target_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Runtime] = []

    def fail(_target: Any, _draft: Any, runtime: Runtime, **_: Any) -> None:
        opened.append(runtime)
        raise spmoe.DeviceError("no such expert")

    monkeypatch.setattr(loader, "estimate", fail)
    with pytest.raises(spmoe.DeviceError, match="no such expert"):
        spmoe.load(target_path, expert_memory="50%")
    with pytest.raises(spmoe.Error, match="closed"):
        opened[0].forward(0, torch.zeros(1, 64), torch.zeros(1, 1).long(), torch.ones(1, 1))
