"""tools/run_stages.py: every stage runs, whatever fails, and the last lines sum them up."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "run_stages.py"


def run(folder: Path, *targets: str) -> subprocess.CompletedProcess[str]:
    """Run stages, with a `make` that writes its arguments down and fails if "red" is one."""
    make = folder / "make"
    make.write_text(f'#!/bin/sh\necho "$@" >> {folder}/ran\ncase "$*" in *red*) exit 1;; esac\n')
    make.chmod(0o755)
    return subprocess.run(
        [sys.executable, TOOL, *targets],
        env={"MAKE": str(make)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("targets", "status", "summary"),
    [
        (("red", "green", "red", "blue"), 1, "2 passed, 2 failed"),
        (("green", "blue"), 0, "2 passed, 0 failed"),
        (("green", "blue red"), 1, "1 passed, 1 failed"),
    ],
)
def test_a_red_stage_hides_no_other(
    tmp_path: Path, targets: tuple[str, ...], status: int, summary: str
) -> None:
    done = run(tmp_path, *targets)
    ran = (tmp_path / "ran").read_text().splitlines()
    side_by_side = "--keep-going --jobs=2 --output-sync "
    assert ran == [side_by_side * (" " in target) + target for target in targets]
    assert done.returncode == status
    lines = done.stdout.splitlines()
    assert lines[-1] == summary
    shown = [re.split(r"  +", line) for line in lines[-1 - len(targets) : -1]]
    assert [line[:2] for line in shown] == [
        [target, "FAILED" if "red" in target else "passed"] for target in targets
    ]
