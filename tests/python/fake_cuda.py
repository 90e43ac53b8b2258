"""spmoe on a CUDA device without a GPU: `_core` over the fake CUDA runtime, torch over a fake GPU.

`make test-fake-cuda` builds that `_core` and names its folder in SPMOE_FAKE_CUDA. To be imported
before `spmoe`, which takes it then instead of its own.
"""

from __future__ import annotations

import gc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fake_device
from fake_device import FakeDevice

FOLDER = os.environ.get("SPMOE_FAKE_CUDA", "")
IS_ON = bool(FOLDER)

# Numbers of errors, as in cuda_runtime_api.h.
OUT_OF_MEMORY = 2
ILLEGAL_ADDRESS = 700
LAUNCH_FAILURE = 719


def _load_core() -> None:
    name = "spmoe._core"
    if name in sys.modules:
        raise ImportError(f"import fake_cuda before spmoe, which has {sys.modules[name].__file__}")
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    file = Path(FOLDER).resolve() / f"_core{suffix}"
    if not file.exists():
        raise ImportError(f"SPMOE_FAKE_CUDA={FOLDER} has no {file.name}: run `make test-fake-cuda`")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    core = importlib.util.module_from_spec(spec)
    sys.modules[name] = core
    spec.loader.exec_module(core)


if IS_ON:
    _load_core()
    fake_device.register()


class _TorchOfDevices:
    """torch, as `spmoe.system.devices` sees it: "cuda" is the fake device."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def device(*arguments: Any) -> torch.device:
        asked = torch.device(*arguments)
        return torch.device(fake_device.NAME, asked.index or 0) if asked.type == "cuda" else asked


@contextmanager
def cuda() -> Iterator[Any]:
    """Enter a machine with one fake GPU; yield the fake CUDA runtime, `_core.fake_cuda`.

    At the end, nothing may have been out of order, and nothing may be left on the device.
    """
    from spmoe import _core
    from spmoe.system import devices

    runtime: Any = _core.fake_cuda  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as changed, FakeDevice(runtime.observe_consumer) as device:
        changed.setattr(devices, "torch", _TorchOfDevices())
        changed.setattr(torch.cuda, "is_available", lambda: True)
        changed.setattr(torch.cuda, "get_device_name", lambda *_: "Fake GPU")
        changed.setattr(torch.cuda, "mem_get_info", lambda *_: runtime.memory())
        changed.setattr(
            torch.cuda,
            "current_stream",
            lambda *_: SimpleNamespace(cuda_stream=runtime.consumer()),
        )
        try:
            yield runtime
        finally:
            runtime.observe_consumer()
            device.lent.clear()
    gc.collect()
    violations = runtime.violations()
    left = runtime.restart()
    assert not violations, violations
    assert not left, left
