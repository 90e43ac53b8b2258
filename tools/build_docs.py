"""Builds the documentation as a site, from the same files that GitHub shows.

The documents link to each other, to pictures and to source files by relative paths. All of these
are copied into one folder, with their own folders, and mkdocs builds the site from it; a link that
leads nowhere is an error. Run from the repository's root.

    python tools/build_docs.py [path/to/mkdocs]
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "build" / "docs" / "source"
DOCUMENTS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/*.md", "bench/results/README.md")

_CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def documents(root: Path = ROOT) -> list[Path]:
    """Return the documents of a tree, in the order of `DOCUMENTS`."""
    return [path for pattern in DOCUMENTS for path in sorted(root.glob(pattern))]


def links(text: str) -> Iterator[str]:
    """Yield the targets of a document's links and pictures, those in code left out."""
    yield from _LINK.findall(_CODE.sub("", text))


def linked_files(root: Path = ROOT) -> list[Path]:
    """Return every file that a site needs: the documents, and the files that they link to.

    Markdown files that only a document names, such as tables of results, are followed too.

    Raises:
        FileNotFoundError: A link names a file that is not there.
    """
    found: list[Path] = []
    waiting = documents(root)
    while waiting:
        path = waiting.pop(0)
        if path in found:
            continue
        found.append(path)
        if path.suffix != ".md":
            continue
        for link in links(path.read_text(encoding="utf-8")):
            name = link.partition("#")[0]
            if not name or "://" in name:
                continue
            target = (path.parent / name).resolve()
            if not target.is_file():
                raise FileNotFoundError(f"{path.relative_to(root)} links to {name}, not a file")
            waiting.append(target)
    return found


def main(mkdocs: str) -> int:
    """Copy the files and build the site; return the exit status of mkdocs."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    for path in linked_files():
        place = SOURCE / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    quietly = os.environ | {"NO_MKDOCS_2_WARNING": "true"}  # the versions are fixed
    command = [mkdocs, "build", "--strict", "--quiet"]
    return subprocess.run(command, cwd=ROOT, env=quietly, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:] or ["mkdocs"]))
