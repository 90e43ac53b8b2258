"""How fast experts come from files into slots here, by the runtime's own copy path."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from spmoe.bench.bounds import touch_all
from spmoe.demo.cache import PARTIAL, check_space, only_process
from spmoe.reporting.progress import Progress, silent
from spmoe.runtime import Runtime
from spmoe.store import open_store

REPEATS = 5  # of a measurement; the median counts


@dataclass(frozen=True, slots=True)
class Sample:
    """Experts that are written to be read again. An expert is three square matrices in bf16.

    Attributes:
        side: Of a matrix. 1024 makes an expert of 6.3 MB, between those that shipped models have.
        experts: Of a layer; one layer fits the slots, so that every pass reads everything.
        layers: Each a file.
    """

    side: int = 1024
    experts: int = 10
    layers: int = 4

    @property
    def file_bytes(self) -> int:
        """All experts."""
        return self.layers * self.layer_bytes

    @property
    def layer_bytes(self) -> int:
        """The experts of one layer."""
        return self.experts * 3 * self.side**2 * torch.bfloat16.itemsize


@dataclass(frozen=True, slots=True)
class Link:
    """The path from store to slots, in 10^9 bytes a second.

    Attributes:
        device: Where the slots are.
        file_bytes: What was read.
        cold_gbps: From the disk; None where the file system keeps the pages of its files.
        cached_gbps: From the page cache.
        pinned_gbps: From page-locked memory; None on the host, which holds none.
    """

    device: str
    file_bytes: int
    cold_gbps: float | None
    cached_gbps: float
    pinned_gbps: float | None


def measure_link(
    folder: Path,
    *,
    device: str = "host",
    sample: Sample | None = None,
    progress: Progress | None = None,
) -> Link:
    """Write experts into a temporary folder and let a runtime read them, in all the ways it can.

    One process at a time measures; samples that killed ones left behind are removed.

    Args:
        folder: On the disk that is to be measured; made if it is not there.
        device: As for `Runtime`.
        sample: What to write.
        progress: Called with a description, and done of total.

    Raises:
        Error: The disk has no room for the sample.
        OSError: The folder cannot be written.
    """
    sample = sample or Sample()
    report = progress or silent
    room = folder / "doctor"
    with only_process(room, report, other="another `spmoe doctor`"):
        for leftover in folder.glob("doctor-*/"):  # of versions without a lock
            shutil.rmtree(leftover)
        check_space(room, sample.file_bytes, "measuring the link")
        with tempfile.TemporaryDirectory(prefix=f".sample{PARTIAL}", dir=room) as place:
            return _measure(Path(place), device, sample, report)


def _measure(place: Path, device: str, sample: Sample, report: Progress) -> Link:
    """Return the link by a sample in the empty folder ``place``."""
    files = _write(place, sample, report)
    unpinned = {} if device == "host" else {"pinned_memory": 0}
    with _open(files, sample, device, **unpinned) as runtime:
        touch_all(runtime)  # slots and pages
        cached = _median("reading from the page cache", report, partial(_pass_gbps, runtime))
        can_drop = _drop_pages(files)
        cold = (
            _median("reading from the disk", report, partial(_cold_gbps, runtime, files))
            if can_drop
            else None
        )
    pinned = None
    if device != "host":
        with _open(files, sample, device, pinned_memory="100%") as runtime:
            touch_all(runtime)
            pinned = _median(
                "copying from page-locked memory", report, partial(_pass_gbps, runtime)
            )
    return Link(device, sample.file_bytes, cold, cached, pinned)


def chosen_isa() -> str:
    """Return the kernels that a runtime on the host chooses.

    Raises:
        OSError: There is no folder for temporary files.
    """
    sample = Sample(side=32, experts=1, layers=1)
    with tempfile.TemporaryDirectory() as place:
        files = _write(Path(place), sample, silent)
        with _open(files, sample, "host") as runtime:
            return str(runtime.stats(by_layer=False)["isa"])


def memcpy_gbps(size_bytes: int) -> float:
    """Return 10^9 bytes a second that torch copies in RAM, with all of its threads."""
    source = torch.ones(size_bytes, dtype=torch.uint8)
    target = torch.zeros(size_bytes, dtype=torch.uint8)  # every page is touched
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return size_bytes / statistics.median(seconds) / 1e9


def _median(what: str, report: Progress, measure: Callable[[], float]) -> float:
    values = []
    for number in range(REPEATS):
        values.append(measure())
        report(what, number + 1, REPEATS)
    return statistics.median(values)


def _write(place: Path, sample: Sample, report: Progress) -> list[Path]:
    """Write a file a layer, all of the same random weights, and wait until they are on the disk."""
    names = [
        f"experts.{expert}.{matrix}_proj.weight"
        for expert in range(sample.experts)
        for matrix in ("gate", "up", "down")
    ]
    weights = [torch.randn(sample.side, sample.side).bfloat16() for _ in names]
    files = []
    for layer in range(sample.layers):
        files.append(place / f"layer-{layer}.safetensors")
        prefix = f"model.layers.{layer}.mlp."
        tensors = {f"{prefix}{name}": weight for name, weight in zip(names, weights, strict=True)}
        save_file(tensors, files[-1])
        with files[-1].open("rb") as file:
            os.fsync(file.fileno())
        report("writing experts to read", layer + 1, sample.layers)
    return files


def _open(files: Sequence[Path], sample: Sample, device: str, **options: Any) -> Runtime:
    return Runtime(
        open_store(files),
        expert_memory=sample.layer_bytes,
        experts_per_token=1,
        device=device,
        eviction="auto",  # misses every expert of a pass, so that each is moved
        **options,
    )


def _pass_gbps(runtime: Runtime) -> float:
    """Access every expert once; return what the link moved a second while it was busy."""
    with runtime.counting() as used:
        touch_all(runtime)
    return used.link_bytes / used.link_busy_s / 1e9


def _cold_gbps(runtime: Runtime, files: Sequence[Path]) -> float:
    _drop_pages(files)
    return _pass_gbps(runtime)


def _drop_pages(files: Sequence[Path]) -> bool:
    """Ask that the page cache let go of ``files``; return whether it did."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            try:
                # Answers only what needs no reading.
                os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
            except BlockingIOError:
                continue
            except OSError:  # the file system does not say
                return False
            return False
    return True
