"""Run `spmoe bench` of two checkouts in turn, and print the ratios of their figures cell by cell.

Each is named by the folder that holds its package `spmoe`, compiled part included: `python` of a
checkout that was built in place, or the site-packages of an environment. They take turns, so that
a change of the machine's load meets both. Pair, profile and machine are shared. A ratio under 1
says that the second one moves fewer bytes or takes less time.

Example:
    git worktree add ../before 309053b    # and build it
    python bench/python/compare_checkouts.py ../before/python python --repeats 2 -- \
      --demo --link-gbps 1 --policies all --expert-memory 10%,25%,50% -n 48
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

Cell = tuple[str, str, str]  # policy, budget, draft length
FIGURES = {"bytes_per_token": 1e-6, "tpot_s": 1e3}  # shown in MB and ms


def measure(checkout: Path, arguments: list[str]) -> dict[Cell, dict[str, float]]:
    """Return the figures of each cell of one run of `spmoe bench`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        subprocess.run(
            [sys.executable, "-m", "spmoe", "bench", *arguments, "--repeats=1", f"--json={file}"],
            env=os.environ | {"PYTHONPATH": str(checkout.resolve())},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    return {
        (row["policy"], row["expert_memory"], str(row["draft_length"])): {
            "bytes_per_token": row["bytes_per_token"],
            "tpot_s": row["tpot_s"]["mean"],
        }
        for row in rows
    }


def main() -> None:
    """Take turns, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("before", type=Path, help="the package that ratios are over")
    parser.add_argument("after", type=Path)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("bench", nargs="+", help="options of `spmoe bench`, behind --")
    options = parser.parse_args()
    runs = [
        [measure(checkout, options.bench) for checkout in (options.before, options.after)]
        for _ in range(options.repeats)
    ]
    print("| policy | memory | drafted | MB a token | ratio | ms a token | ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    ratios: dict[str, list[float]] = {name: [] for name in FIGURES}
    for cell in runs[0][0]:
        shown = []
        for name, scale in FIGURES.items():
            old, new = (
                statistics.median(run[which][cell][name] for run in runs) for which in (0, 1)
            )
            ratio = new / old if old else 1.0
            ratios[name].append(ratio)
            shown.append(f"{old * scale:.1f} -> {new * scale:.1f} | {ratio:.3f}")
        print("|", " | ".join((*cell, *shown)), "|", flush=True)
    for name, values in ratios.items():
        logs = [math.log(value) for value in values if value > 0]
        mean = math.exp(statistics.mean(logs)) if logs else 1.0
        print(f"{name}: geometric mean {mean:.3f}, {min(values):.3f} to {max(values):.3f}")


if __name__ == "__main__":
    main()
