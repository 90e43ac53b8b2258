#pragma once

#include <memory>

#include "compute/layer_compute.hpp"

namespace spmoe {

/// On the CUDA device of that index: all work goes to `LayerArgs::consumer`, and nothing blocks.
/// @throws DeviceError if this build or machine has none; OutOfMemory.
std::unique_ptr<LayerCompute> make_cuda_layer_compute(const BlobFormat& format,
                                                      ActivationParams activation, int index);

}  // namespace spmoe
