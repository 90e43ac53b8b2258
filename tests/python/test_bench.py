"""`spmoe bench` on a tiny checkpoint: every key, every policy, the same tokens."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from spmoe import cli
from spmoe.bench import bench, report
from spmoe.bench.bounds import slot_bound_s
from spmoe.bench.cell import Tally
from spmoe.decoding import planner, prior
from spmoe.errors import InvalidArgument
from spmoe.prompts import Prompt, select_prompts
from spmoe.reporting.counters import Counters
from spmoe.runtime import POLICIES

PROMPTS = [Prompt("a", "file", "Once upon a time"), Prompt("b", "file", "The disk")]
KEYS = {
    *("policy", "eviction", "expert_memory_bytes", "draft_length", "dtype", "prompts"),
    *("new_tokens", "ttft_s", "tpot_s", "tokens_per_s", "acceptance", "tokens_per_iteration"),
    *("hit_rate", "late_rate", "recall", "bytes_per_token", "wasted_share", "link_gbps"),
    *("link_share", "stall_s_per_token", "compute_s_per_token", "bound_tpot_s"),
    *("ratio_to_bound", "slot_bound_tpot_s", "ratio_to_slot_bound", "identical"),
}


@pytest.fixture(autouse=True, scope="module")
def prefetching_pays() -> Iterator[None]:
    """For models so small what is measured says now this, now that."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (planner, prior):
            patch.setattr(module, "break_even", lambda **_: 0.2)
        yield


@pytest.fixture(scope="module")
def result(target_path: Path) -> dict:
    return bench(
        target_path,
        target_path,
        PROMPTS,
        expert_memory=["40%", "70%"],
        draft_lengths=[0, 3],
        max_new_tokens=10,
        repeats=1,
    )


def test_every_cell_of_the_grid_has_every_key(result: dict) -> None:
    assert len(result["rows"]) == len(POLICIES) * 2 * 2
    assert result.keys() >= {"machine", "link_peak_gbps", "paced", "rows"}
    for row in result["rows"]:
        assert row.keys() >= KEYS
        assert row["tpot_s"].keys() == {"mean", "p50", "p90", "p99"}
        assert row["new_tokens"] == 20
        assert 0 <= row["hit_rate"] + row["late_rate"] <= 1


def test_every_policy_writes_the_targets_own_tokens(result: dict) -> None:
    assert all(row["identical"] for row in result["rows"])


def test_the_bound_is_the_same_for_every_policy_of_a_cell(result: dict) -> None:
    bounds: dict[tuple[object, object], set[float]] = {}
    for row in result["rows"]:
        cell = (row["expert_memory"], row["draft_length"])
        bounds.setdefault(cell, set()).add(row["bound_tpot_s"])
    assert all(len(values) == 1 and values.pop() > 0 for values in bounds.values())


def test_what_slots_do_not_hold_crosses_the_link_during_verification() -> None:
    needed = Counters(hits=30, late=10, misses=20)
    ran = Tally(
        token_s=[1.0] * 12,
        ttft_s=[1.0] * 2,
        iterations=6,  # four of them verify
        counters=needed,
        expert_bytes=100,
        slots=10,
    )
    resident = Tally(token_s=[0.5] * 12, draft_s=1.2)
    # 60 experts in 4 passes, of which ten slots hold 40; the link moves ten a second.
    assert slot_bound_s(ran, resident, 1e-6) == pytest.approx(0.1 + 0.4)  # compute
    assert slot_bound_s(ran, resident, 2e-7) == pytest.approx(0.1 + 20 * 0.5 / 12)
    roomy = replace(ran, slots=16)
    assert slot_bound_s(roomy, resident, 1e-9) == pytest.approx(0.1 + 0.4)


def test_the_oracle_moves_the_fewest_bytes(result: dict) -> None:
    def moved(policy: str) -> float:
        return sum(row["bytes_per_token"] for row in result["rows"] if row["policy"] == policy)

    assert all(moved("oracle") <= moved(policy) * 1.05 for policy in POLICIES)


def test_a_draft_that_is_the_target_predicts_what_it_reads(result: dict) -> None:
    recalls = [
        row["recall"]
        for row in result["rows"]
        if row["policy"] == "sp-moe" and row["draft_length"] == 3
    ]
    assert all(recall > 0.6 for recall in recalls)


def test_degraded_predictions_are_recalled_less_and_change_no_token(
    target_path: Path, result: dict
) -> None:
    degraded = bench(
        target_path,
        target_path,
        PROMPTS,
        policies=["sp-moe"],
        expert_memory=["40%"],
        draft_lengths=[3],
        max_new_tokens=10,
        repeats=1,
        degrade_prediction=0.9,
    )["rows"][0]
    whole = next(
        row
        for row in result["rows"]
        if (row["policy"], row["expert_memory"], row["draft_length"]) == ("sp-moe", "40%", 3)
    )
    assert degraded["identical"]
    assert degraded["recall"] < whole["recall"]


def test_reports_have_a_line_a_row(result: dict, tmp_path: Path) -> None:
    rows = len(result["rows"])
    assert len(report.markdown(result).strip().splitlines()) == rows + 4
    report.write_csv(tmp_path / "rows.csv", result)
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == rows + 1


def test_json_on_the_command_line_is_one_object(
    target_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *("bench", str(target_path), "--policies", "on-demand", "--expert-memory", "50%"),
        *("--draft-length", "0", "-n", "4", "--repeats", "1", "--prompts", "own:0:1", "--json"),
    ]
    monkeypatch.setattr(sys, "argv", ["spmoe", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 1


@pytest.mark.parametrize(("selection", "count"), [("own", 20), ("own:0:4", 4), ("own:18:99", 2)])
def test_prompts_are_chosen_by_name_and_slice(selection: str, count: int) -> None:
    assert len(select_prompts(selection)) == count


@pytest.mark.parametrize("selection", ["others", "own:5", "own:a:b", "own:7:7", "own:20:30"])
def test_a_selection_that_is_none_is_refused(selection: str) -> None:
    with pytest.raises(InvalidArgument):
        select_prompts(selection)


def test_an_unknown_policy_is_refused_with_the_known_ones(target_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r'policy "best" asked; use some of on-demand'):
        bench(target_path, None, PROMPTS, policies=["best"])
