#pragma once

#include <stdexcept>
#include <string>

namespace spmoe {

/// Base of every error that spmoe throws on purpose. A message says what was asked, what was
/// found, and what to do.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// An argument or setting is wrong; nothing was changed.
class InvalidArgument : public Error {
 public:
  using Error::Error;
};

/// Memory that was asked for is not to be had.
class OutOfMemory : public Error {
 public:
  using Error::Error;
};

/// A device or a link failed: a read, a copy, a kernel.
class DeviceError : public Error {
 public:
  using Error::Error;
};

/// A checkpoint is damaged, incomplete, or of a kind that spmoe does not read.
class CheckpointError : public Error {
 public:
  using Error::Error;
};

/// A file of the checkpoint was written to after it was opened. Python sees a `DeviceError` too,
/// since the bytes that were asked for can no longer be read.
class CheckpointChanged : public CheckpointError {
 public:
  using CheckpointError::CheckpointError;
};

}  // namespace spmoe
