"""Findings of `spmoe doctor` for people: a line each, with the cure where something is off."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from spmoe.config import format_bytes, format_count
from spmoe.doctor.report import Report

UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Line:
    """One finding for people; `cure` is empty where nothing is off."""

    name: str
    value: str
    cure: str = ""


def describe(report: Report) -> Iterator[Line]:
    """Yield the findings in the order of interest."""
    yield from _describe_cuda(report)
    yield from _describe_link(report)
    yield from _describe_memory(report)
    yield from _describe_processor(report)
    yield Line("kernel", report.system.kernel or UNKNOWN)
    for name, found in report.versions.items():
        yield Line(name, found)


def _describe_cuda(report: Report) -> Iterator[Line]:
    cuda, system = report.cuda, report.system
    usable = ", ".join(f"{device} ({name})" for device, name in cuda.devices.items())
    yield Line("CUDA", usable or "not usable", cuda.reason)
    yield Line("GPUs", ", ".join(system.gpus) or "none found")
    yield Line("NVIDIA driver", system.nvidia_driver or "not loaded")
    yield Line("torch's CUDA", cuda.torch or "built without")


def _describe_link(report: Report) -> Iterator[Line]:
    if report.link_failure:
        yield Line("link", "not measured", report.link_failure)
    for link in report.links:
        cold = (
            "this file system keeps its pages" if link.cold_gbps is None else _gbps(link.cold_gbps)
        )
        if link.pinned_gbps is not None:
            yield Line(f"link to {link.device}, page-locked", _gbps(link.pinned_gbps))
        yield Line(f"link to {link.device}, page cache", _gbps(link.cached_gbps))
        yield Line(f"link to {link.device}, from disk", cold)
    if report.memcpy_gbps is not None:
        threads = format_count(torch.get_num_threads(), "thread")
        yield Line(f"memcpy, {threads}", _gbps(report.memcpy_gbps))


def _describe_memory(report: Report) -> Iterator[Line]:
    memory = report.memory
    yield Line("RAM", _size(memory.total_bytes))
    yield Line("RAM available", _size(memory.available_bytes))
    yield Line(
        "memory limit of the control group",
        "none found" if memory.limit_bytes is None else format_bytes(memory.limit_bytes),
    )
    yield Line("could be page-locked, at most", _size(memory.usable_bytes))
    yield Line("RLIMIT_MEMLOCK", *_lock_limit(report))
    cure = (
        "slots cannot have huge pages, and copies into them fault more often: "
        "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
        if memory.huge_pages == "never"
        else ""
    )
    yield Line("transparent huge pages", memory.huge_pages or UNKNOWN, cure)


def _lock_limit(report: Report) -> tuple[str, str]:
    limit, usable = report.memory.lock_limit_bytes, report.memory.usable_bytes
    if limit is None or limit == "unlimited":
        return limit or UNKNOWN, ""
    if usable is None or limit >= usable or not (report.cuda.devices or report.system.gpus):
        return format_bytes(limit), ""  # only the pinned pool of a GPU locks pages
    return format_bytes(limit), (
        f"RLIMIT_MEMLOCK is {format_bytes(limit)}, and {format_bytes(usable)} could be "
        "page-locked: should pinned memory be refused, run `ulimit -l unlimited` before spmoe, or "
        "start the container with --ulimit memlock=-1"
    )


def _describe_processor(report: Report) -> Iterator[Line]:
    processor = report.processor
    yield Line("processor", processor.name or UNKNOWN)
    features = processor.features
    yield Line("features", UNKNOWN if features is None else " ".join(features) or "none of use")
    cure = (
        "the kernels of this processor's instruction set were not chosen: it has no AVX2, or its "
        "virtual machine hides it; let the hypervisor pass the host's processor through"
        if report.isa == "baseline" and platform.machine() == "x86_64"
        else ""
    )
    yield Line("kernels on the host", report.isa or UNKNOWN, cure)
    cores, quota = processor.cores, processor.quota_cores
    yield Line("cores", UNKNOWN if cores is None else str(cores))
    throttled = cores is not None and quota is not None and quota < cores
    yield Line(
        "processor quota of the control group",
        "none found" if quota is None else f"{quota:g} cores",
        f"threads for {cores} cores share the time of {quota:g} and stall each other: raise the "
        "quota, or run spmoe under `taskset -c` with as many cores as the quota has"
        if throttled
        else "",
    )


def _size(size_bytes: int | None) -> str:
    return UNKNOWN if size_bytes is None else format_bytes(size_bytes)


def _gbps(gbps: float) -> str:
    return f"{gbps:.2f} GB/s"
