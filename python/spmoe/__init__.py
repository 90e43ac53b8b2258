"""Mixture-of-Experts models larger than memory, with speculative decoding that helps.

SP-MoE (arXiv:2510.10302) and beyond: see README.md and docs/design.md.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

# Threads of torch's OpenMP that spin for long take the cores from the copy threads, and ones that
# sleep at once are slow to wake: a short spin does neither. Read by torch as it is loaded, so a
# program that imports torch before spmoe has to set them itself.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault("KMP_BLOCKTIME", "0")

__all__ = [
    "CheckpointError",
    "DeviceError",
    "Engine",
    "Error",
    "Generation",
    "InvalidArgument",
    "Metrics",
    "OutOfMemory",
    "Policy",
    "Runtime",
    "Verification",
    "__version__",
    "load",
    "open_store",
    "verify",
]

if TYPE_CHECKING:
    from spmoe.bench.verification import Verification, verify
    from spmoe.decoding.generation import Generation
    from spmoe.engine import Engine
    from spmoe.errors import CheckpointError, DeviceError, Error, InvalidArgument, OutOfMemory
    from spmoe.loader import load
    from spmoe.policies import Policy
    from spmoe.reporting.metrics import Metrics
    from spmoe.runtime import Runtime
    from spmoe.store import open_store

    __version__: str
else:
    # Importing torch and transformers takes seconds: a name imports its module when it is first
    # used (PEP 562). No module may have the name of a function here, whose place it would take.
    _MODULES = {
        "spmoe.engine": ("Engine",),
        "spmoe.errors": (
            "CheckpointError",
            "DeviceError",
            "Error",
            "InvalidArgument",
            "OutOfMemory",
        ),
        "spmoe.decoding.generation": ("Generation",),
        "spmoe.loader": ("load",),
        "spmoe.reporting.metrics": ("Metrics",),
        "spmoe.policies": ("Policy",),
        "spmoe.runtime": ("Runtime",),
        "spmoe.store": ("open_store",),
        "spmoe.bench.verification": ("Verification", "verify"),
    }
    _HOMES = {name: module for module, names in _MODULES.items() for name in names}

    def __getattr__(name):
        if name == "__version__":
            value = import_module("importlib.metadata").version("spmoe")
        elif name in _HOMES:
            value = getattr(import_module(_HOMES[name]), name)
        else:
            try:
                if name.startswith("__"):
                    raise ModuleNotFoundError(name=f"spmoe.{name}")
                value = import_module(f"spmoe.{name}")  # `spmoe.runtime` after `import spmoe`
            except ModuleNotFoundError as error:
                if error.name != f"spmoe.{name}":
                    raise
                raise AttributeError(f"module 'spmoe' has no attribute {name!r}") from None
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
