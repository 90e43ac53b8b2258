"""The scripts in bench/python run, at a tiny size."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import spmoe
from compare_offload import reason_to_skip
from replay_routing import fitting_layers
from spmoe import cli
from spmoe.errors import Error
from spmoe.runtime import POLICIES

pytestmark = pytest.mark.slow  # each script imports torch again, and measures

BENCHES = Path(__file__).parents[2] / "bench" / "python"


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, BENCHES / script, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


STATES = ["residual", "mlp-input", "attention"]
STATES += [f"residual, {share}% exchanged" for share in (25, 50, 75, 100)]


@pytest.mark.parametrize(
    ("options", "sources"),
    [
        ([], [*STATES, "previous layer"]),
        (["--map"], [*STATES, "layer map", "previous layer"]),
        (["--draft-layers", 2], ["layer map", "previous layer"]),
    ],
)
def test_predictor_recall(
    options: list[object], sources: list[str], target_path: Path, prompts: Path, tmp_path: Path
) -> None:
    models = ["--model", target_path, "--draft-model", target_path]
    files = ["--md", tmp_path / "out.md", "--json", tmp_path / "out.json"]
    printed = run("predictor_recall.py", *models, "--prompts", prompts, "-n", 8, *options, *files)
    first, *_ = (tmp_path / "out.md").read_text().splitlines()
    assert first.startswith("`python ")
    assert "predictor_recall.py --model" in first
    assert "easy case" not in printed  # that is said of the built-in pair
    result = json.loads((tmp_path / "out.json").read_text())
    assert list(result["by_token"]) == sources
    assert (result["prompts"], result["new_tokens"]) == (2, 16)
    found = result["by_token"][sources[0]]["layers"]
    assert len(found["each"]) == 3
    assert found["overall"]["needed"] == 16 * 3 * 3
    # The draft is the target: its own states are always right, a map's nearly.
    assert (found["overall"]["at_k"] == 1) == (sources[0] == "residual")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("Once upon a time\nthere was a disk\n")
    return file


def test_cutoff_sweep(target_path: Path, prompts: Path, tmp_path: Path) -> None:
    models = [target_path, "--draft-model", target_path, "--expert-memory", "50%"]
    files = ["--md", tmp_path / "sweep.md", "--plot", tmp_path / "sweep.svg"]
    options = ["--step", 2, "--repeats", 1, "-n", 8, "--prompts", prompts]
    printed = run("cutoff_sweep.py", *models, *options, *files)
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")]
    assert rows[2:5] == ["0", "2", "3"]  # every second layer, and all of them
    assert rows[5].startswith("least-wait: ")
    assert rows[6].startswith("paper: ")
    assert (tmp_path / "sweep.md").read_text().endswith(printed)
    assert "<svg" in (tmp_path / "sweep.svg").read_text()


def test_link_share(target_path: Path, prompts: Path, tmp_path: Path) -> None:
    models = [target_path, "--draft-model", target_path, "--link-gbps", 0.01]
    options = ["-n", 8, "--prompts", prompts, "--policy", "on-demand", "--md", tmp_path / "out.md"]
    printed = run("link_share.py", *models, *options)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[4:]]
    *lengths, total = rows
    assert total[0] == "all"
    for column in (1, 2):
        assert sum(int(row[column]) for row in lengths) == int(total[column]) > 0
    counted = float(printed.splitlines()[0].rpartition(" ")[2])
    assert float(total[3]) == pytest.approx(counted, abs=0.05)  # nothing was cancelled
    assert (tmp_path / "out.md").read_text() == printed
    with pytest.raises(subprocess.CalledProcessError):
        run("link_share.py", target_path, *options)


def test_draw_timeline(target_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace, picture = tmp_path / "trace.json", tmp_path / "picture.svg"
    models = [str(target_path), "--draft-model", str(target_path), "--expert-memory", "50%"]
    arguments = ["generate", *models, "-p", "Hello", "-n", "16", "--quiet", "--trace", str(trace)]
    monkeypatch.setattr(sys, "argv", ["spmoe", *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    run("draw_timeline.py", trace, picture, "--iteration", 1)
    drawn = picture.read_text()
    for text in ("draft", "verify", "link: prefetch", "tokens", "accepted"):
        assert f"<!-- {text}" in drawn or text in drawn
    assert "<svg" in drawn


def test_model_memory(target_path: Path) -> None:
    printed = run("model_memory.py", "--config", target_path)
    assert "(100%)" in printed  # a model so small fits whole


def test_every_script_is_run_here() -> None:
    text = Path(__file__).read_text()
    scripts = [file for file in BENCHES.glob("*.py") if '"__main__"' in file.read_text()]
    assert len(scripts) > 10
    assert [script.name for script in scripts if f'"{script.name}"' not in text] == []


def test_verify_families() -> None:
    printed = run("verify_families.py", "--family", "mixtral", "-n", 4)
    assert "mixtral" in printed


def test_linear_rows(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    printed = run("linear_rows.py", "--shapes", "8x16", "--mib", 0, "--repeats", 1, "--json", file)
    rows = json.loads(file.read_text())
    assert len(rows) == 2 * 5
    assert all(row["usual_gbps"] > 0 and row["turned_gbps"] > 0 for row in rows)
    assert "8x16" in printed


def test_synthetic_checkpoint(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    options = ["--layers", 1, "--shrink", 64]
    printed = run("synthetic_checkpoint.py", "mixtral-8x7b", directory, *options)
    assert printed.startswith(f"{directory}: mixtral-8x7b, 0.0")
    assert spmoe.open_store(sorted(directory.glob("*.safetensors"))).expert_count == 8


TRIAL = ["mixtral-8x7b", "--layers", 2, "--shrink", 64, "--requests", 1, "--iterations", 2]


def test_expert_ffn_vs_torch(tmp_path: Path) -> None:
    options = ["--shrink", 16, "--repeats", 1, "--json", tmp_path / "out.json"]
    printed = run("expert_ffn_vs_torch.py", "qwen3-30b-a3b", *options)
    assert printed.startswith("qwen3-30b-a3b, widths / 16, 128 experts, bfloat16; ")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["rows"] for row in rows] == [1, 2, 4, 8, 16, 32]
    assert all(row["spmoe_gbps"] > 0 < row["torch_gbps"] for row in rows)


def test_replay_routing_by_a_model(tmp_path: Path) -> None:
    files = ["--checkpoint", tmp_path / "model", "--json", tmp_path / "out.json"]
    options = ["--expert-memory", "50%,100%", "--link-gbps", "0,1", "--draft-length", 2]
    printed = run("replay_routing.py", *TRIAL, *options, *files, "--md", tmp_path / "out.md")
    assert (tmp_path / "out.md").read_text() == printed
    assert "Driven by a statistical model: 38% (first layer) to 54% (last)" in printed
    assert "random weights" in printed
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == 2 * 2 * len(POLICIES)
    assert all(row["tokens"] >= row["iterations"] == 2 for row in rows)
    assert {(row["paced"], row["link_gbps"]) for row in rows} == {(False, 0.0), (True, 1.0)}
    options = ["--policies", "on-demand", "--expert-memory", "50%"]
    again = run("replay_routing.py", *TRIAL, *options, *files)
    assert "on-demand + lru" in again  # over the checkpoint that is there


def test_replay_routing_fits_layers_into_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"shape": "mixtral-8x7b", "shrink": 1, "device": "host", "checkpoint": None}
    free = SimpleNamespace(disk=1 << 50, ram=1 << 50)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free.disk))
    memory = lambda: SimpleNamespace(usable_bytes=free.ram)  # noqa: E731
    monkeypatch.setattr("replay_routing.read_memory", memory)
    assert fitting_layers(flags | {"expert_memory": "10%,50%"}) == 32
    layer_bytes = 2.9e9  # eight experts of 352 MB, and attention
    free.ram = 10.5 * 1.5 * layer_bytes / 0.8  # store and pool; a fifth stays free
    assert fitting_layers(flags | {"expert_memory": "10%,50%"}) == 10
    assert fitting_layers(flags | {"expert_memory": "100%"}) == 7
    free.disk = 1 << 30
    with pytest.raises(Error, match=r"two layers of mixtral-8x7b are 5\.4 GiB, for which"):
        fitting_layers(flags | {"expert_memory": "50%"})


@pytest.mark.needs_cuda
def test_replay_routing_on_a_gpu() -> None:
    options = ["--expert-memory", "50%", "--device", "cuda:0"]
    assert "horizon + predicted-use" in run("replay_routing.py", *TRIAL, *options)


def test_replay_routing_by_a_recording(target_path: Path, prompts: Path, tmp_path: Path) -> None:
    recording = tmp_path / "routing.json"
    pair = [target_path, "--draft-model", target_path, "--prompts", prompts, "--draft-length", 2]
    printed = run("record_routing.py", *pair, "-n", 8, "--out", recording)
    assert printed.startswith(f"{recording}: 2 requests, ")
    recorded = json.loads(recording.read_text())
    first = recorded["requests"][0][0]
    # The draft is the target: it is always accepted, and predicts all rows but the last.
    assert first["accepted"] == 2
    assert [[sorted(k) for k in row] for row in first["by_draft"]] == [
        [sorted(k) for k in row] for row in first["experts"][:-1]
    ]
    printed = run("replay_routing.py", *TRIAL, "--recording", recording, "--expert-memory", "50%")
    assert "recorded from the pair" in printed
    assert "2 drafted, 100.0% accepted" in printed


def test_compare_offload(target_path: Path) -> None:
    models = [target_path, "--draft-model", target_path, "--expert-memory", "50%"]
    printed = run(
        "compare_offload.py", *models, "--device", "host", "-n", 4, "--prompts", "own:0:1"
    )
    if importlib.util.find_spec("accelerate") is None:
        assert printed == "skipped: accelerate is not installed: pip install accelerate\n"
        return
    rows = [line.split("|")[1:] for line in printed.splitlines() if line.startswith("|")][2:]
    assert [row[0].strip() for row in rows] == ["spmoe, horizon"] * 2 + [
        "transformers, accelerate"
    ] * 2
    assert all(row[3].strip() == "1 of 1" for row in rows)


def test_compare_checkouts(target_path: Path) -> None:
    package = Path(spmoe.__file__).parents[1]
    bench = (target_path, "--policies", "on-demand", "--expert-memory", "50%")
    text = run("compare_checkouts.py", package, package, "--", *bench, "--draft-length", 0, "-n", 4)
    rows = [line for line in text.splitlines() if line.startswith("| on-demand")]
    assert len(rows) == 1
    assert "| 1.000 |" in rows[0]  # the same bytes
    assert "bytes_per_token: geometric mean 1.000" in text


def test_compare_offload_says_why_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    monkeypatch.setattr("compare_offload.cuda_status", lambda: (0, "no driver"))
    assert reason_to_skip("host") is None
    assert reason_to_skip("cuda:0") == "cuda:0 is not usable: no driver"
    monkeypatch.setattr("compare_offload.cuda_status", lambda: (1, ""))
    assert reason_to_skip("cuda:0") is None
