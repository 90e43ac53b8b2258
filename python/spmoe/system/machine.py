"""A machine, read off /proc and /sys. A value that these do not have is None, never an error."""

from __future__ import annotations

import platform
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

# Features that spmoe's kernels use, or could: names of /proc/cpuinfo.
FEATURES = ("f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512_bf16", "amx_tile", "amx_bf16")


@dataclass(frozen=True, slots=True)
class Processor:
    """Where experts are computed on the host.

    Attributes:
        name: What it calls itself.
        features: Of `FEATURES`, those that it has; None if it does not say.
        cores: Cores that this process may run on.
        quota_cores: Processor time that the control group gives, in cores; None: no limit found.
    """

    name: str | None
    features: tuple[str, ...] | None
    cores: int | None
    quota_cores: float | None


@dataclass(frozen=True, slots=True)
class Memory:
    """RAM and what a process may have of it.

    Attributes:
        total_bytes: RAM.
        available_bytes: MemAvailable: free, or page cache that the kernel would give up.
        limit_bytes: Of the control group, where that is less than RAM; None: no limit found.
        lock_limit_bytes: RLIMIT_MEMLOCK.
        huge_pages: Transparent huge pages: "always", "madvise" or "never".
        usable_bytes: What is available and what the group's limit leaves, whichever is less.
    """

    total_bytes: int | None
    available_bytes: int | None
    limit_bytes: int | None
    lock_limit_bytes: int | Literal["unlimited"] | None
    huge_pages: str | None
    usable_bytes: int | None


@dataclass(frozen=True, slots=True)
class System:
    """The kernel.

    Attributes:
        kernel: Its release.
        nvidia_driver: Version of NVIDIA's kernel module; None: not loaded.
        gpus: Models that the module found.
    """

    kernel: str | None
    nvidia_driver: str | None
    gpus: tuple[str, ...]


def read_processor(root: Path = Path("/")) -> Processor:
    """Return the processor, and how much of it this process may use.

    Args:
        root: Where proc and sys are.
    """
    info = _fields(root / "proc/cpuinfo")
    flags = info.get("flags") or info.get("Features")  # x86, Arm
    features = tuple(name for name in FEATURES if name in flags.split()) if flags else None
    allowed = _fields(root / "proc/self/status").get("Cpus_allowed_list")
    quotas = [quota for group in _groups(root) if (quota := _quota_cores(group)) is not None]
    return Processor(
        name=info.get("model name"),
        features=features,
        cores=_count(allowed) if allowed else None,
        quota_cores=min(quotas, default=None),
    )


def read_memory(root: Path = Path("/")) -> Memory:
    """Return RAM and its limits; ``root`` as for `read_processor`."""
    info = _fields(root / "proc/meminfo")
    total = _kib(info.get("MemTotal"))
    groups = [room for group in _groups(root) if (room := _group_room(group, total)) is not None]
    limit = min((limit for limit, _ in groups), default=None)
    left = [room for _, room in groups]
    pages = re.search(
        r"\[(\w+)\]", _read(root / "sys/kernel/mm/transparent_hugepage/enabled") or ""
    )
    available = _kib(info.get("MemAvailable"))
    return Memory(
        total_bytes=total,
        available_bytes=available,
        limit_bytes=limit,
        lock_limit_bytes=_lock_limit(_read(root / "proc/self/limits") or ""),
        huge_pages=pages[1] if pages else None,
        usable_bytes=min([*left, *([available] if available is not None else [])], default=None),
    )


def read_system(root: Path = Path("/")) -> System:
    """Return the kernel's own; ``root`` as for `read_processor`."""
    driver = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", _read(root / "proc/driver/nvidia/version") or "")
    models = [
        _fields(file).get("Model")
        for file in sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    ]
    return System(
        kernel=_read(root / "proc/sys/kernel/osrelease"),
        nvidia_driver=driver[0] if driver else None,
        gpus=tuple(model or "unknown" for model in models),
    )


def cpu_model() -> str:
    """Return the name that the processor has for itself."""
    return read_processor().name or platform.processor()


def peak_rss_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    # getrusage counts the parent's memory too, as it was when it forked.
    peak = _kib(_fields(Path("/proc/self/status")).get("VmHWM"))
    return peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def package_version(name: str) -> str | None:
    """Return the version of an installed Python package; None: it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _groups(root: Path) -> Iterator[Path]:
    """Yield the folders of this process's control groups and of all above them, either version."""
    mount = root / "sys/fs/cgroup"
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        # Inside a container the path may be the host's, and only the mount's own folder be there.
        for base in [mount / controllers] if controllers else [mount, mount / "unified"]:
            place = base / path.lstrip("/")
            while place != base:
                yield place
                place = place.parent
            yield base


def _group_room(group: Path, total_bytes: int | None) -> tuple[int, int] | None:
    """Return the limit of a control group and what it leaves; None if it has none.

    Pages of files that the group caches count as left, since the kernel would give them up.
    """
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit = _number(_read(group / limit_name))
        # The first version of control groups writes a huge number for none.
        if limit is None or (total_bytes is not None and limit >= total_bytes):
            continue
        used = _number(_read(group / used_name)) or 0
        # In the first version the names without "total_" leave out the groups below.
        prefix = "total_" if used_name == "memory.usage_in_bytes" else ""
        stat = dict(line.split()[:2] for line in (_read(group / "memory.stat") or "").splitlines())
        cached = sum(
            _number(stat.get(f"{prefix}{name}")) or 0 for name in ("inactive_file", "active_file")
        )
        return limit, max(0, limit - max(0, used - cached))
    return None


def _quota_cores(group: Path) -> float | None:
    quota, _, period = (_read(group / "cpu.max") or "").partition(" ")
    if not quota:
        quota = _read(group / "cpu.cfs_quota_us") or ""
        period = _read(group / "cpu.cfs_period_us") or ""
    quota_us, period_us = _number(quota), _number(period)
    return quota_us / period_us if quota_us and period_us else None


def _lock_limit(limits: str) -> int | Literal["unlimited"] | None:
    soft = re.search(r"^Max locked memory\s+(\S+)", limits, re.MULTILINE)
    if soft is None:
        return None
    return "unlimited" if soft[1] == "unlimited" else _number(soft[1])


def _count(cores: str) -> int:
    """Return how many cores a list such as "0-3,8" names."""
    ranges = [part.partition("-") for part in cores.split(",")]
    return sum(int(last or first) - int(first) + 1 for first, _, last in ranges)


def _kib(text: str | None) -> int | None:
    number = _number(text.split()[0]) if text else None
    return number * 1024 if number is not None else None


def _number(text: str | None) -> int | None:
    """Return what a file says if it is a number that is not negative ("max" and -1: no limit)."""
    return int(text) if text is not None and text.isdecimal() else None


def _fields(file: Path) -> dict[str, str]:
    """Return the first "name: value" of each name."""
    fields: dict[str, str] = {}
    for line in (_read(file) or "").splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    return fields


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
