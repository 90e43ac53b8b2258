"""Mixture-of-Experts models larger than memory, with speculative decoding that helps.

SP-MoE (arXiv:2510.10302) and beyond: see README.md and docs/design.md.
"""

import os
from importlib.metadata import version

# Threads of torch's OpenMP that spin for long take the cores from the copy threads, and ones that
# sleep at once are slow to wake: a short spin does neither. Read by torch as it is loaded, so a
# program that imports torch before spmoe has to set them itself.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault("KMP_BLOCKTIME", "0")

from spmoe.engine import Engine
from spmoe.errors import CheckpointError, DeviceError, Error, InvalidArgument, OutOfMemory
from spmoe.load import load
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
