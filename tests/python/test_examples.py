"""The examples run as they are written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(example: str, *arguments: object) -> str:
    command = [sys.executable, EXAMPLES / example, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_generate_writes_text_and_figures(target_path: Path, draft_path: Path) -> None:
    for arguments in ([target_path], [target_path, draft_path]):
        assert "tokens/s" in run("generate.py", *arguments)


@pytest.mark.slow
def test_a_policy_in_python_prefetches_what_is_used(target_path: Path, draft_path: Path) -> None:
    for arguments in ([target_path], [target_path, draft_path]):
        assert "MB prefetched and used" in run("custom_policy.py", *arguments)


def test_plain_torch_runs_every_layer(target_path: Path) -> None:
    assert "misses" in run("plain_torch.py", *target_path.glob("*.safetensors"))


@pytest.mark.pair
def test_compare_policies_shows_each_policy_and_that_the_texts_are_equal(
    user_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPMOE_CACHE", str(user_cache))
    printed = run("compare_policies.py", "--tokens", 4)
    assert "paced to 1 GB/s" in printed
    for policy in ("on-demand", "sp-moe", "horizon"):
        assert policy in printed
    assert "Every policy wrote the tokens of the target alone." in printed


def test_every_example_is_run_here() -> None:
    text = Path(__file__).read_text()
    assert all(f'"{example.name}"' in text for example in EXAMPLES.glob("*.py"))
