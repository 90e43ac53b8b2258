"""Costs: measured, kept, found again, and refused once they are stale."""

from __future__ import annotations

import itertools
import json
import logging
import sys
from pathlib import Path

import pytest
import torch

import spmoe
from spmoe import cli, loader
from spmoe.costs import measure, probe
from spmoe.costs.measure import make_profile
from spmoe.costs.profile import Fingerprint, Profile, find_profile, known_costs, known_layer_map
from spmoe.errors import InvalidArgument
from spmoe.models.loading import load_target
from spmoe.prediction import states
from spmoe.settings import Settings


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SPMOE_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def made(target_path: Path) -> Profile:
    return make_profile(target_path, target_path, repeats=2)


def fingerprint(target: Path, draft: Path | None, **changed: object) -> Fingerprint:
    dtype = changed.pop("dtype", torch.float32)
    return Fingerprint.of(target, draft, Settings(**{"device": "host"} | changed), dtype=dtype)


def test_every_cost_of_the_latency_model_is_measured(made: Profile) -> None:
    assert set(made.costs.layer_s) == {1, 2, 3, 5, 9, 17}
    assert set(made.costs.copy_s) == {1, 2, 4, 8}
    assert made.costs.draft_s > 0
    assert all(
        seconds > 0 for seconds in [*made.costs.layer_s.values(), *made.costs.copy_s.values()]
    )
    assert made.costs.copy_s[8] > made.costs.copy_s[1]
    assert {"draft_s", "prefetch_s", "layer_s[5]", "copy_s[8]"} <= set(made.spread)


def test_a_paced_link_is_measured_as_slow_as_it_is(target_path: Path) -> None:
    gbps = 0.05
    paced = make_profile(
        target_path, None, Settings(expert_memory="50%", link_gbps=gbps), repeats=2
    ).costs
    assert paced.draft_s == 0
    assert paced.copy_s[8] >= 8 * paced.expert_bytes / (gbps * 1e9) * 0.95


def test_a_draft_whose_states_cannot_be_read_has_costs_but_no_map(
    target_path: Path,
    draft_path: Path,
    made: Profile,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(measure, "measure", lambda *_, **__: (made.costs, made.spread))
    monkeypatch.setattr(states, "_PLACES", {"mlp-input": (("unknown",), True)})
    profile = make_profile(target_path, draft_path)
    assert profile.layer_map is None
    assert profile.costs == made.costs
    assert "LlamaDecoderLayer has no unknown" in caplog.text


def test_experts_that_are_all_resident_take_no_time(target_path: Path) -> None:
    target = load_target(target_path)
    with target.open_runtime(expert_memory="100%", policy="sp-moe") as runtime:
        copies = probe.copies(runtime, 2)
        losses = probe.losses(runtime, 1, lambda: None)
        everything = runtime.store.layer_count * runtime.store.expert_count
        assert [next(copies) for _ in range(everything)][-1] == 0.0
        assert next(losses) == 0.0
        assert list(itertools.islice(probe.rates(runtime, 1), 4))[-1] == 0.0


def test_a_link_alone_is_as_fast_as_it_is_paced(target_path: Path) -> None:
    target = load_target(target_path)
    with target.open_runtime(expert_memory="50%", policy="sp-moe", link_gbps=0.01) as runtime:
        rates = itertools.islice(probe.rates(runtime, target.experts_per_token), 5)
        assert 0.005 < max(rates) <= 0.01001


def test_what_another_sampler_left_resident_is_passed_over(target_path: Path) -> None:
    target = load_target(target_path)
    with target.open_runtime(expert_memory="50%", policy="sp-moe") as runtime:
        rates = probe.rates(runtime, target.experts_per_token)
        for batch in (1, 2, 4):
            copies = probe.copies(runtime, batch)
            for _ in range(4):
                next(rates)  # which fills all slots
                assert next(copies) > 0


def test_a_kept_profile_is_found(made: Profile) -> None:
    assert made.save() == made.fingerprint.path
    found = find_profile(made.fingerprint)
    assert found == made
    assert known_costs(made.fingerprint) == made.costs


def test_another_pair_or_setting_has_no_profile(
    made: Profile, target_path: Path, draft_path: Path
) -> None:
    made.save()
    assert find_profile(fingerprint(target_path, draft_path)) is None
    assert find_profile(fingerprint(target_path, None)) is None
    assert find_profile(fingerprint(target_path, target_path, link_gbps=1.0)) is None
    assert find_profile(fingerprint(target_path, target_path, dtype=torch.bfloat16)) is None
    assert find_profile(fingerprint(target_path, target_path)) is not None


def test_one_of_another_machine_is_stale_and_says_why(
    made: Profile, caplog: pytest.LogCaptureFixture
) -> None:
    path = made.save()
    kept = json.loads(path.read_text())
    kept["fingerprint"]["machine"]["cpu"] = "Z80"
    path.write_text(json.dumps(kept))
    with pytest.raises(InvalidArgument, match=r'cpu "Z80", but here it is ".*run `spmoe profile`'):
        find_profile(made.fingerprint)
    with caplog.at_level(logging.WARNING):
        assert known_costs(made.fingerprint) is None
    assert "estimating instead" in caplog.text


@pytest.mark.parametrize("text", ["", "{", '{"format": 0}', '{"costs": 1}'])
def test_a_damaged_one_is_refused(made: Profile, text: str) -> None:
    made.save().write_text(text)
    with pytest.raises(InvalidArgument, match="not a profile of this version"):
        find_profile(made.fingerprint)


def test_load_uses_what_is_kept(
    made: Profile, target_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.save()
    monkeypatch.setattr(loader, "estimate", None)  # would fail if it were called
    with spmoe.load(target_path, target_path, expert_memory="50%") as engine:
        assert engine.planner is not None
        assert engine.planner.costs == made.costs


def test_without_a_profile_load_estimates_within_the_budget(target_path: Path) -> None:
    with spmoe.load(target_path, target_path, expert_memory="20%") as engine:
        assert engine.planner is not None
        assert engine.planner.costs.draft_s > 0
        assert engine.generate("Hello", max_new_tokens=8).stats.new_tokens == 8
        assert set(engine.planner.costs.layer_s) <= {1, 2, 3, 4, 5}  # as iterations came


def test_a_draft_of_another_shape_gets_a_layer_map_that_load_uses(
    target_path: Path, draft_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_profile(target_path, draft_path, repeats=2).save()
    with (
        caplog.at_level(logging.WARNING),
        spmoe.load(target_path, draft_path, expert_memory="50%", policy="sp-moe") as engine,
    ):
        assert engine.layer_map is not None
        engine.cutoff_layer = engine.runtime.store.layer_count  # whatever this machine says
        engine.generate("Hello", max_new_tokens=12, draft_length=2)
        assert engine.runtime.stats()["predictions"] > 0
    assert "no layer map" not in caplog.text


def test_a_stale_layer_map_is_left_out_with_a_warning(
    target_path: Path, draft_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = make_profile(target_path, draft_path, repeats=2)
    made.save()
    assert made.layer_map is not None
    made.layer_map.save(made.fingerprint.layer_map_path, "another pair")
    with caplog.at_level(logging.WARNING):
        assert known_layer_map(made.fingerprint) is None
    assert "is stale" in caplog.text


def test_policies_without_limits_are_not_measured(target_path: Path) -> None:
    with spmoe.load(target_path, expert_memory="50%", policy="on-demand") as engine:
        assert engine.planner is None


def test_the_command_keeps_one_and_prints_it(
    target_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["profile", str(target_path), "--draft-model", str(target_path), "--repeats", "2"]
    for flags in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["spmoe", *arguments, *flags])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert exit_.value.code == 0
        out = capsys.readouterr().out
        if flags:
            assert Path(json.loads(out)["path"]).parent == cache / "profiles"
            assert json.loads(out)["costs"]["draft_s"] > 0
        else:
            for line in ("draft step", "target layer, 1 row ", "link, 8 experts", "kept in"):
                assert line in out
    assert find_profile(fingerprint(target_path, target_path)) is not None
