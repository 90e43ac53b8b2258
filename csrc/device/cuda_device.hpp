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

/// The CUDA device of that index. @throws DeviceError with `CudaStatus::reason` if there is none.
[[nodiscard]] std::unique_ptr<Device> make_cuda_device(int index);

}  // namespace spmoe
