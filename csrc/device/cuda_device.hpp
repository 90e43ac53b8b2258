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

/// @throws DeviceError unless there is a CUDA device of that index; it says what there is.
void require_cuda_device(int index);

/// The CUDA device of that index. Copies go over streams of its own: what rests in pinned memory
/// of the device directly, what rests in a file or elsewhere through pinned buffers.
/// @throws DeviceError as `require_cuda_device`; InvalidArgument as `check`.
[[nodiscard]] std::unique_ptr<Device> make_cuda_device(int index, const DeviceOptions& options);

}  // namespace spmoe
