#pragma once

#include <memory>

#include "compute/layer_compute.hpp"

namespace spmoe {

/// Computes layers with the kernels of the CUDA device of that index, on the consumer's stream of
/// each call. Consecutive calls may come on different streams: each waits on the device for the one
/// before. Never blocks the calling thread, and its memory grows at most with a new maximum of
/// rows. Blobs are of the device's memory; aligned to 16 bytes, with sizes that are multiples of 8,
/// they are read at full speed.
/// @throws DeviceError if there is no such device, InvalidArgument if a size is 0.
std::unique_ptr<LayerCompute> make_cuda_layer_compute(const BlobFormat& format,
                                                      ActivationParams activation,
                                                      int device_index);

}  // namespace spmoe
