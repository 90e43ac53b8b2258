#include "base/error.hpp"
#include "compute/cuda_layer_compute.hpp"

namespace spmoe {

std::unique_ptr<LayerCompute> make_cuda_layer_compute(const BlobFormat&, ActivationParams, int) {
  throw DeviceError{"this spmoe was built without CUDA, so only the host computes"};
}

}  // namespace spmoe
