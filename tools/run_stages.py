"""Run targets of `make` one after the other, all of them whatever fails, and sum them up.

Example:
    python3 tools/run_stages.py setup test-cpp test-python
"""

from __future__ import annotations

import os
import subprocess
import sys
import time


def main(targets: list[str]) -> int:
    """Run every target; return 0 if all of them passed, else 1."""
    results: list[tuple[str, bool, float]] = []
    for target in targets:
        print(f"\n=== {target}", flush=True)
        start = time.monotonic()
        done = subprocess.run([os.environ.get("MAKE", "make"), target], check=False)
        passed = done.returncode == 0
        results.append((target, passed, time.monotonic() - start))
    width = max(len(target) for target in targets)
    print(f"\n{'stage':{width}}  result  seconds")
    for target, passed, seconds in results:
        print(f"{target:{width}}  {'passed' if passed else 'FAILED'}  {seconds:7.0f}")
    failed = sum(not passed for _, passed, _ in results)
    print(f"{len(results) - failed} passed, {failed} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
