#pragma once

#include <memory>
#include <string>

#include "device/device.hpp"

namespace spmoe {

/// Whether CUDA can be used here, and if not, why.
struct CudaStatus {
  int device_count = 0;
  std::string reason;  ///< empty if `device_count` > 0
};

/// Asks the driver, each time. Never throws: a machine without CUDA is an answer.
[[nodiscard]] CudaStatus cuda_status();

/// Why the device of that index cannot be used, and the cure; empty if it can. Asks for its compute
/// capability and for the features that the backend needs; allocates nothing there. Never throws.
[[nodiscard]] std::string cuda_device_problem(int index);

/// @throws DeviceError with `cuda_device_problem` unless that is empty.
void require_cuda_device(int index);

/// The CUDA device of that index. Copies go over streams of its own: bytes in pinned memory of the
/// device directly, bytes in a file or elsewhere through pinned buffers.
/// @throws DeviceError as `require_cuda_device`.
[[nodiscard]] std::unique_ptr<Device> make_cuda_device(int index);

}  // namespace spmoe
