#include "base/error.hpp"
#include "compute/cuda/cuda_layer_compute.hpp"
#include "device/cuda/cuda_device.hpp"

namespace spmoe {

std::unique_ptr<LayerCompute> make_cuda_layer_compute(const BlobFormat&, ActivationParams, int) {
  throw DeviceError{cuda_status().reason};
}

}  // namespace spmoe
