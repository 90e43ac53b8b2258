"""Which device computes: names, and whether they can be used here."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch

from spmoe import _core
from spmoe.errors import DeviceError, InvalidArgument

log = logging.getLogger("spmoe")

_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")  # there while its kernel module is loaded


def cuda_status() -> tuple[int, str]:
    """Return how many CUDA devices spmoe and torch can use here, and if none, why."""
    count, reason = _core.cuda_status()
    if count and not torch.cuda.is_available():
        return 0, (
            f"torch {torch.__version__} cannot use CUDA; install a torch that is built for it, or "
            'use device="host"'
        )
    if count and _first_usable(count) is None:
        return 0, _core.cuda_device_problem(0)
    return count, reason


def _first_usable(count: int) -> int | None:
    return next((i for i in range(count) if not _core.cuda_device_problem(i)), None)


def resolve_device(name: str) -> torch.device:
    """Return the device that a setting means.

    "auto" warns where it falls back to the host beside a GPU.

    Args:
        name: "auto" or "cuda": the first CUDA device that spmoe can use, and for "auto" the host
            without one; "host" or "cpu"; or "cuda:<index>".

    Raises:
        InvalidArgument: It is none of these.
        DeviceError: There is no such CUDA device that can be used; the message says why.
    """
    if name in ("host", "cpu"):
        return torch.device("cpu")
    match = re.fullmatch(r"auto|cuda(?::([0-9]+))?", name) if isinstance(name, str) else None
    if match is None:
        raise InvalidArgument(f'device "{name}" is not one of auto, host, cuda, cuda:<index>')
    count, reason = cuda_status()
    if name == "auto" and not count:
        if torch.cuda.is_available() or _NVIDIA_DRIVER.exists():
            log.warning(
                "a GPU is here, but everything runs on the host: %s; to be quiet, give "
                'device="host"',
                reason.removesuffix('; use device="host"'),
            )
        return torch.device("cpu")
    index = int(match[1]) if match[1] else _first_usable(count)
    if index is None or index >= count:
        problem = reason or f"the CUDA devices here are cuda:0 to cuda:{count - 1}"
    else:
        problem = _core.cuda_device_problem(index)
    if problem or index is None:
        raise DeviceError(f'device "{name}" asked: {problem}')
    return torch.device("cuda", index)


def native_name(device: torch.device) -> str:
    """Return what the native runtime calls a device: "host" or "cuda:<index>"."""
    return "host" if device.type == "cpu" else f"cuda:{device.index}"


def device_model(name: str) -> str:
    """Return what the device of a native name calls itself; "host" is just that."""
    return name if name == "host" else str(torch.cuda.get_device_name(torch.device(name)))
