"""The errors that spmoe raises on purpose; every one is an `Error`."""

from spmoe._core import CheckpointError, DeviceError, Error, InvalidArgument, OutOfMemory

__all__ = ["CheckpointError", "DeviceError", "Error", "InvalidArgument", "OutOfMemory"]
