"""Run clang-tidy over the C++ files that differ from a base, or over all of them.

A header is read through its own source file or, without one, through the first file that includes
it.

Example:
    python tools/tidy.py build/lint --base main
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def git(*arguments: str) -> list[str]:
    """Return the lines that git prints."""
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()


def changed_files(base: str) -> set[Path]:
    """Return what differs from where this branch left ``base``, uncommitted files included."""
    since = git("merge-base", base, "HEAD")[0]
    names = git("diff", "--name-only", "--diff-filter=d", since)
    names += git("ls-files", "--others", "--exclude-standard")
    return {ROOT / name for name in names}


def sources_to_read(changed: set[Path], sources: list[Path]) -> set[Path]:
    """Return those of ``sources`` through which clang-tidy sees every file that changed."""
    wanted = changed & set(sources)
    for header in (file for file in changed if file.suffix in {".hpp", ".h", ".cuh"}):
        own = header.with_suffix(".cpp")
        include = re.compile(rf'#include "([^"]*/)?{re.escape(header.name)}"')
        readers = [file for file in sources if include.search(file.read_text())]
        wanted |= {own} if own in readers else set(readers[:1])
    return wanted


def main() -> int:
    """Run clang-tidy; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("build", type=Path, help="build folder with compile_commands.json")
    parser.add_argument("--base", default="", help="branch or commit to compare with")
    parser.add_argument("--all", action="store_true", help="every file")
    options = parser.parse_args()
    commands = json.loads((options.build / "compile_commands.json").read_text())
    files = [(Path(c["directory"]) / c["file"]).resolve() for c in commands]
    sources = sorted({f for f in files if f.is_relative_to(ROOT) and ".venv" not in f.parts})
    if options.all or not options.base:
        wanted, compared = set(sources), "all files"
    else:
        wanted = sources_to_read(changed_files(options.base), sources)
        compared = f"what differs from {options.base[:12]}"
    print(f"clang-tidy: {len(wanted)} of {len(sources)} files ({compared})", flush=True)
    if not wanted:
        return 0
    jobs = str(len(os.sched_getaffinity(0)))
    command = ["run-clang-tidy.py", "-quiet", "-p", str(options.build), "-j", jobs]
    command += [f"^{re.escape(str(file))}$" for file in sorted(wanted)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        print(done.stdout)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
