#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <vector>

namespace spmoe::cuda {

/// Copies to hand over in one call. Keeps its memory between batches. One thread.
class BatchCopy {
 public:
  /// Asks the driver whether it takes batches.
  BatchCopy();

  void clear();
  void add(void* dst, const void* src, std::size_t bytes);

  /// Enqueues all of them, from page-locked memory to the device, in no particular order.
  /// @throws DeviceError; some of them may have been enqueued.
  void enqueue(cudaStream_t stream);

 private:
  bool batches_;
  std::vector<void*> dsts_;
  std::vector<const void*> srcs_;
  std::vector<std::size_t> bytes_;
};

}  // namespace spmoe::cuda
