"""A profile is advice: no damage to it, and no cache folder, ends or changes a load."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import spmoe
from spmoe.costs.costs import Costs
from spmoe.costs.profile import Fingerprint, Profile, find_profile, known_costs, known_layer_map
from spmoe.decoding.planner import Planner
from spmoe.decoding.prior import Shape
from spmoe.models.loading import load_draft, load_target
from spmoe.policies import traits_of
from spmoe.prediction.layer_map import LayerMap
from spmoe.settings import Settings
from spmoe.system import whole_file

SEEDS = range(300)
COSTS = Costs(
    draft_s=0.01,
    layer_s={1: 0.001, 5: 0.002},
    copy_s={1: 0.001, 8: 0.006},
    expert_bytes=1 << 20,
    prefetch_s=0.0001,
    draft_token_s=0.0005,
)
JUNK: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**70, 1e308, -1e-300, 5e-324, float("nan"), float("inf")),
    *("", "8", "nan", [], [1], {}, {"1": "2"}, {"1": None}, {"": 1}, {"-1": 1}),
)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SPMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def kept(target_path: Path) -> Profile:
    fingerprint = Fingerprint.of(target_path, None, Settings(device="host"), dtype=torch.float32)
    profile = Profile(COSTS, {"draft_s": 0.1}, fingerprint)
    profile.save()
    return profile


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside a value of JSON."""
    yield at
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*at, key))


def damaged(text: str, rng: random.Random) -> bytes:
    """Return a file with one thing wrong: bytes, or a value of another kind."""
    way = rng.randrange(4)
    data = bytearray(text.encode())
    if way == 0:
        return bytes(data[: rng.randrange(len(data))])
    if way == 1:
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)
    value = json.loads(text)
    *to, last = rng.choice(list(places(value))[1:])
    inner = value
    for key in to:
        inner = inner[key]
    if way == 2:
        del inner[last]
    else:
        inner[last] = rng.choice(JUNK)
    return json.dumps(value).encode()


def test_random_damage_is_never_an_error_and_what_is_read_can_be_planned_with(
    kept: Profile, caplog: pytest.LogCaptureFixture
) -> None:
    path = kept.fingerprint.path
    text = path.read_text()
    shape = Shape(layers=3, experts=8, experts_per_token=2, memory_bytes=12 << 20)
    refused = 0
    for seed in SEEDS:
        path.write_bytes(damaged(text, random.Random(seed)))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            costs = known_costs(kept.fingerprint)
        if costs is None:
            refused += 1
            assert len(caplog.records) == 1, seed
            assert "estimating instead" in caplog.text
        else:
            assert not caplog.records, seed
            Planner(costs, shape, policy=traits_of("horizon")).plan((4,))
    assert refused > len(SEEDS) / 2


@pytest.mark.parametrize("data", [b"", b"[1]", b"null", b'{"format": 2}', b"[" * 100_000])
def test_json_of_another_shape_is_refused(kept: Profile, data: bytes) -> None:
    kept.fingerprint.path.write_bytes(data)
    with pytest.raises(spmoe.InvalidArgument, match=r"not a profile of this version.*run `spmoe"):
        find_profile(kept.fingerprint)


def test_what_is_no_file_is_refused_without_waiting(kept: Profile) -> None:
    path = kept.fingerprint.path
    for make in (Path.mkdir, os.mkfifo):
        path.unlink()
        make(path)
        with pytest.raises(spmoe.InvalidArgument, match="not a profile of this version"):
            find_profile(kept.fingerprint)
        path.rmdir() if path.is_dir() else path.unlink()
        path.touch()


def test_costs_of_other_experts_are_stale(kept: Profile, caplog: pytest.LogCaptureFixture) -> None:
    assert known_costs(kept.fingerprint, 1 << 20) == COSTS
    assert known_costs(kept.fingerprint, 1 << 21) is None
    assert "experts of 1048576 bytes, but here they take 2097152" in caplog.text


def load_without_advice(target_path: Path, caplog: pytest.LogCaptureFixture) -> str:
    """Load, write a text, and return the warnings."""
    caplog.clear()
    with caplog.at_level(logging.WARNING), spmoe.load(target_path, expert_memory="50%") as engine:
        assert engine.planner is not None
        assert len(engine.generate("Hello", max_new_tokens=2).token_ids) == 2
    return caplog.text


def test_a_cache_that_is_a_file_holds_no_profile(
    target_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("")
    assert load_without_advice(target_path, caplog) == ""


def test_a_folder_that_may_not_be_entered_costs_one_warning(
    target_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stat = Path.stat

    def refuse(path: Path, **options: Any) -> os.stat_result:  # root may enter every folder
        if "profiles" in path.parts:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    monkeypatch.setattr(os.path, "exists", lambda path: bool(Path(path).stat()))
    warned = load_without_advice(target_path, caplog)
    assert warned.count("WARNING") == 1
    assert "Permission denied" in warned
    assert "set SPMOE_CACHE" in warned


def test_a_user_without_a_home_gets_one_warning(
    target_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SPMOE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    warned = load_without_advice(target_path, caplog)
    assert warned.count("WARNING") == 1
    assert "no home folder" in warned


def test_a_full_disk_leaves_nothing_and_names_the_cure(
    kept: Profile, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kept.fingerprint.path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(whole_file.os, "fsync", full)
    with pytest.raises(spmoe.Error, match=r"cannot be kept in .*No space left.*SPMOE_CACHE"):
        kept.save()
    assert [file.name for file in (cache / "profiles").iterdir()] == [kept.fingerprint.path.name]
    assert kept.fingerprint.path.read_bytes() == before


@pytest.fixture(scope="module")
def pair(target_path: Path, draft_path: Path) -> tuple[Any, Any, Fingerprint]:
    settings = Settings(device="host")
    fingerprint = Fingerprint.of(target_path, draft_path, settings, dtype=torch.float32)
    return load_target(target_path), load_draft(draft_path), fingerprint


def test_random_damage_leaves_the_layer_map_out_with_one_warning(
    pair: tuple[Any, Any, Fingerprint], caplog: pytest.LogCaptureFixture
) -> None:
    target, draft, fingerprint = pair
    path = fingerprint.layer_map_path
    path.parent.mkdir(parents=True)
    good = LayerMap((0, 0, 0), torch.ones(3, 65, 8), 2, (0.5, 0.5, 0.5))
    whole: bytes | None = None
    for seed in range(100):
        rng = random.Random(seed)
        parts = {
            "draft_layers": rng.choice([(0, 0, 0), (0, 0), (9, 9, 9), (0.5, 0.0, 0.0), ()]),
            "weights": torch.ones(
                rng.choice([3, 3, 2]), rng.choice([65, 65, 1]), rng.choice([8, 8, 1])
            ).to(rng.choice([torch.float32, torch.float32, torch.int8])),
            "experts_per_token": rng.choice([2, 2, 0, 99]),
            "held_out_recall": (0.5, 0.5, 0.5),
        }
        LayerMap(**parts).save(path, fingerprint.pair)
        data = bytearray(path.read_bytes())
        whole = whole or bytes(data)
        if rng.randrange(2):
            data = data[: rng.randrange(len(data))]
        path.write_bytes(data)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = known_layer_map(fingerprint, target, draft)
        assert (found is None) == (len(caplog.records) == 1), seed
        if found is not None:
            assert found.mismatch(target, draft) is None
    good.save(path, fingerprint.pair)
    reason = good.mismatch(target, draft)
    assert (known_layer_map(fingerprint, target, draft) is None) == (reason is not None)


def test_a_layer_map_of_another_shape_does_not_end_a_load(
    pair: tuple[Any, Any, Fingerprint],
    target_path: Path,
    draft_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = pair[2].layer_map_path
    path.parent.mkdir(parents=True)
    LayerMap((5, 5, 5), torch.ones(3, 9, 8), 2, (0.5, 0.5, 0.5)).save(path, pair[2].pair)
    with (
        caplog.at_level(logging.WARNING),
        spmoe.load(target_path, draft_path, expert_memory="50%") as engine,
    ):
        assert engine.layer_map is None
    assert "stale: it was fitted for draft layers [5, 5, 5]" in caplog.text
