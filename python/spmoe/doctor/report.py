"""Everything that `spmoe doctor` finds, as data."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from spmoe.config import default_cache
from spmoe.doctor.link import Link, chosen_isa, measure_link, memcpy_gbps
from spmoe.errors import Error
from spmoe.reporting.progress import Progress
from spmoe.system.devices import cuda_status
from spmoe.system.machine import (
    Memory,
    Processor,
    System,
    package_version,
    read_memory,
    read_processor,
    read_system,
)

_MEMCPY_BYTES = 256 << 20  # larger than a processor's caches


@dataclass(frozen=True, slots=True)
class Cuda:
    """Whether spmoe can use CUDA here.

    Attributes:
        devices: "cuda:<index>" of those that spmoe can use -> what they call themselves.
        reason: Why there is none; empty if there is one.
        torch: The CUDA version that torch was built with; None: torch was built without.
    """

    devices: dict[str, str]
    reason: str
    torch: str | None


@dataclass(frozen=True, slots=True)
class Report:
    """Findings. None in any place: not known, or not measured.

    Attributes:
        processor: See `Processor`.
        memory: See `Memory`.
        system: See `System`.
        cuda: See `Cuda`.
        versions: Of spmoe and what it runs on.
        isa: Kernels that the runtime chooses on the host.
        links: Measured, a device each.
        link_failure: Why one was not; empty if nothing failed.
        memcpy_gbps: In RAM, 10^9 bytes a second.
    """

    processor: Processor
    memory: Memory
    system: System
    cuda: Cuda
    versions: dict[str, str]
    isa: str | None
    links: tuple[Link, ...]
    link_failure: str
    memcpy_gbps: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return everything by name."""
        return asdict(self)


def examine(
    *, root: Path = Path("/"), measure: bool = True, progress: Progress | None = None
) -> Report:
    """Look at this machine; a value that it does not give is no error.

    Args:
        root: Where proc and sys are.
        measure: Measure the link too, with a temporary file in the cache folder.
        progress: Called with a description, and done of total.
    """
    cuda = _find_cuda()
    links: list[Link] = []
    failure = ""
    isa = memcpy = None
    try:
        isa = chosen_isa()
        if measure:
            memcpy = memcpy_gbps(_MEMCPY_BYTES)
            links = [
                measure_link(default_cache(), device=device, progress=progress)
                for device in ("host", *cuda.devices)
            ]
    except (OSError, Error) as error:
        failure = str(error)
    return Report(
        processor=read_processor(root),
        memory=read_memory(root),
        system=read_system(root),
        cuda=cuda,
        versions=_versions(),
        isa=isa,
        links=tuple(links),
        link_failure=failure,
        memcpy_gbps=memcpy,
    )


def _find_cuda() -> Cuda:
    count, reason = cuda_status()
    names = {f"cuda:{index}": torch.cuda.get_device_name(index) for index in range(count)}
    return Cuda(names, reason, torch.version.cuda)


def _versions() -> dict[str, str]:
    names = ("spmoe", "torch", "transformers")
    packages = {name: package_version(name) or "not installed" for name in names}
    libc = " ".join(platform.libc_ver()).strip()
    return packages | {"Python": platform.python_version(), "libc": libc or "unknown"}
