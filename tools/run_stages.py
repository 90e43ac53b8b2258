"""Run targets of `make` one after the other, all of them whatever fails, and sum them up.

An argument of several targets, separated by spaces, is one stage whose targets run side by side.

Example:
    python3 tools/run_stages.py setup test-cpp test-python "fuzz soak"
"""

from __future__ import annotations

import os
import subprocess
import sys
import time


def main(stages: list[str]) -> int:
    """Run every stage; return 0 if all of them passed, else 1."""
    results: list[tuple[str, bool, float]] = []
    make = os.environ.get("MAKE", "make")
    for stage in stages:
        print(f"\n=== {stage}", flush=True)
        start = time.monotonic()
        targets = stage.split()
        side_by_side = ["--keep-going", f"--jobs={len(targets)}", "--output-sync"]
        options = side_by_side if len(targets) > 1 else []
        done = subprocess.run([make, *options, *targets], check=False)
        passed = done.returncode == 0
        results.append((stage, passed, time.monotonic() - start))
    width = max(len(stage) for stage in stages)
    print(f"\n{'stage':{width}}  result  seconds")
    for stage, passed, seconds in results:
        print(f"{stage:{width}}  {'passed' if passed else 'FAILED'}  {seconds:7.0f}")
    failed = sum(not passed for _, passed, _ in results)
    print(f"{len(results) - failed} passed, {failed} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
