#include "base/error.hpp"
#include "device/cuda/cuda_device.hpp"

namespace spmoe {

CudaStatus cuda_status() {
  return {0,
          "this spmoe was built without CUDA; use device=\"host\", or build it with SPMOE_CUDA=ON"};
}

std::string cuda_device_problem(int) { return cuda_status().reason; }

void require_cuda_device(int) { throw DeviceError{cuda_status().reason}; }

std::unique_ptr<Device> make_cuda_device(int) { throw DeviceError{cuda_status().reason}; }

}  // namespace spmoe
