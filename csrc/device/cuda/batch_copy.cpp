#include "device/cuda/batch_copy.hpp"

#include "device/cuda/handle.hpp"

// The one place that knows what CUDA's versions differ in: since 12.8 a batch is one call, which
// lost an argument in 13.0.
namespace spmoe::cuda {

BatchCopy::BatchCopy() {
  int driver = 0;
  SPMOE_CUDA_TRY(cudaDriverGetVersion(&driver));
  batches_ = driver >= 12080;  // a runtime may be newer than its driver
}

void BatchCopy::clear() {
  dsts_.clear();
  srcs_.clear();
  bytes_.clear();
}

void BatchCopy::add(void* dst, const void* src, std::size_t bytes) {
  dsts_.push_back(dst);
  srcs_.push_back(src);
  bytes_.push_back(bytes);
}

void BatchCopy::enqueue(cudaStream_t stream) {
#if CUDART_VERSION >= 12080
  if (batches_ && dsts_.size() > 1) {
    cudaMemcpyAttributes in_order{};
    in_order.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
    std::size_t from_first = 0;
#if CUDART_VERSION >= 13000
    SPMOE_CUDA_TRY(cudaMemcpyBatchAsync(dsts_.data(), srcs_.data(), bytes_.data(), dsts_.size(),
                                        &in_order, &from_first, 1, stream));
#else
    std::size_t failed = 0;
    SPMOE_CUDA_TRY(cudaMemcpyBatchAsync(dsts_.data(), const_cast<void**>(srcs_.data()),
                                        bytes_.data(), dsts_.size(), &in_order, &from_first, 1,
                                        &failed, stream));
#endif
    return;
  }
#endif
  for (std::size_t i = 0; i < dsts_.size(); ++i) {
    SPMOE_CUDA_TRY(cudaMemcpyAsync(dsts_[i], srcs_[i], bytes_[i], cudaMemcpyHostToDevice, stream));
  }
}

}  // namespace spmoe::cuda
