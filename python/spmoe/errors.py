"""The errors that spmoe raises on purpose; every one is an `Error`."""

from spmoe._core import (
    CheckpointChanged,
    CheckpointError,
    DeviceError,
    Error,
    InvalidArgument,
    OutOfMemory,
)

__all__ = [
    "CheckpointChanged",
    "CheckpointError",
    "DeviceError",
    "Error",
    "InvalidArgument",
    "OutOfMemory",
]
