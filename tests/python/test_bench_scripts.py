"""The scripts in bench/python run, at a tiny size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHES = Path(__file__).parents[2] / "bench" / "python"


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, BENCHES / script, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


STATES = ["residual", "mlp-input", "attention"]


@pytest.mark.parametrize(
    ("options", "sources"),
    [
        ([], [*STATES, "previous layer"]),
        (["--map"], [*STATES, "layer map", "previous layer"]),
        (["--draft-layers", 2], ["layer map", "previous layer"]),
    ],
)
def test_predictor_recall(
    options: list[object], sources: list[str], target_path: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\nthere was a disk\n")
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


def test_every_script_is_run_here() -> None:
    text = Path(__file__).read_text()
    assert all(f'"{script.name}"' in text for script in BENCHES.glob("*.py"))
