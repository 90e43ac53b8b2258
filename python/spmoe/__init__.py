"""Mixture-of-Experts models larger than memory, with speculative decoding that helps.

SP-MoE (arXiv:2510.10302) and beyond: see README.md and docs/design.md.
"""

from importlib.metadata import version

from spmoe.engine import Engine, load
from spmoe.errors import CheckpointError, DeviceError, Error, InvalidArgument, OutOfMemory
from spmoe.metrics import Metrics
from spmoe.request import Generation
from spmoe.runtime import Runtime, open_store
from spmoe.verification import Verification, verify

__version__ = version("spmoe")

__all__ = [
    "CheckpointError",
    "DeviceError",
    "Engine",
    "Error",
    "Generation",
    "InvalidArgument",
    "Metrics",
    "OutOfMemory",
    "Runtime",
    "Verification",
    "__version__",
    "load",
    "open_store",
    "verify",
]
