"""Directories that are whole or not there: made beside their place, then renamed into it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from spmoe.config import format_bytes
from spmoe.errors import Error
from spmoe.reporting.progress import Progress

MANIFEST = "manifest.json"
DISK_CURE = "free some space, or set SPMOE_CACHE to a folder on another disk"
_FORMAT = 1  # of the manifest
PARTIAL = ".partial-"  # in the name of what is not whole yet


def is_complete(directory: Path, fingerprint: str) -> bool:
    """Return whether a directory was made whole by this recipe, and its files have their sizes."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        return (manifest["format"], manifest["fingerprint"]) == (_FORMAT, fingerprint) and all(
            (directory / name).stat().st_size == size for name, size in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # not there, of another format, or damaged: to be made again


@contextmanager
def only_process(
    root: Path, progress: Progress, *, other: str = "another process that makes the pair"
) -> Iterator[None]:
    """Hold the lock of a cache; another process that holds it is waited for.

    On entry, what killed processes left behind is removed.

    Args:
        root: The cache's folder; made if it is not there.
        progress: Called with a description if there is somebody to wait for.
        other: Who that is.
    """
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        progress(f"waiting for {other}", 0, 1)
        lock.acquire()
        progress(f"waiting for {other}", 1, 1)
    try:
        for leftover in root.glob(f".*{PARTIAL}*"):
            shutil.rmtree(leftover)
        yield
    finally:
        lock.release()


def discard(directory: Path) -> None:
    """Remove a directory, if it is there; nobody sees half of it. Needs `only_process`."""
    if directory.exists():
        shutil.rmtree(directory.rename(_partial(directory)))


@contextmanager
def making(directory: Path, fingerprint: str) -> Iterator[Path]:
    """Yield an empty directory that becomes ``directory``, now absent, if the block succeeds.

    Needs `only_process`.
    """
    partial = _partial(directory)
    partial.mkdir()
    try:
        yield partial
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        manifest = {"format": _FORMAT, "fingerprint": fingerprint, "files": sizes}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        partial.rename(directory)
        _sync(directory.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_space(root: Path, needed_bytes: int, what: str) -> None:
    """Check that a disk has room for ``what``.

    Raises:
        Error: It has not.
    """
    free = shutil.disk_usage(root).free
    if free < needed_bytes:
        raise Error(
            f"{what} needs {format_bytes(needed_bytes)} in {root}, but "
            f"{format_bytes(free)} are free there; {DISK_CURE}"
        )


def _partial(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}{PARTIAL}{os.getpid()}")


def _sync(path: Path) -> None:
    """Wait until a file or the entries of a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
