#include "compute/cuda/cuda_layer_compute.hpp"

#include <cuda_runtime_api.h>

#include <string>
#include <utility>

#include "base/bytes.hpp"
#include "base/error.hpp"
#include "compute/cuda/expert_ffn_cuda.hpp"
#include "device/cuda/cuda_device.hpp"
#include "device/cuda/handle.hpp"

namespace spmoe {
namespace {

/// Device memory that grows in the order of a stream, so that growing waits for nothing. Whoever
/// destroys it has waited for its last use.
class StreamMemory {
 public:
  explicit StreamMemory(int device) : device_{device} {}
  StreamMemory(const StreamMemory&) = delete;
  StreamMemory& operator=(const StreamMemory&) = delete;
  ~StreamMemory() { static_cast<void>(cudaFree(data_)); }

  /// At least `bytes`, for work queued on `stream` from now on; what was in it may be lost.
  /// @throws OutOfMemory, and holds nothing then.
  std::byte* reserve(std::size_t bytes, cudaStream_t stream) {
    if (bytes <= bytes_) return data_;
    if (data_ != nullptr) SPMOE_CUDA_TRY(cudaFreeAsync(std::exchange(data_, nullptr), stream));
    bytes_ = 0;
    void* data = nullptr;
    const cudaError_t status = cudaMallocAsync(&data, bytes, stream);
    if (status == cudaErrorMemoryAllocation) {
      static_cast<void>(cudaGetLastError());
      std::size_t free_bytes = 0;
      std::size_t total_bytes = 0;
      SPMOE_CUDA_TRY(cudaMemGetInfo(&free_bytes, &total_bytes));
      throw OutOfMemory{"no memory for " + format_bytes(bytes) + " of rows on cuda:" +
                        std::to_string(device_) + ": " + format_bytes(free_bytes) + " free of " +
                        format_bytes(total_bytes) + "; lower expert_memory, or give fewer tokens"};
    }
    cuda::check(status, "cudaMallocAsync");
    data_ = static_cast<std::byte*>(data);
    bytes_ = bytes;
    return data_;
  }

  [[nodiscard]] std::byte* data() const noexcept { return data_; }

 private:
  const int device_;
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

class CudaLayerCompute final : public LayerCompute {
 public:
  CudaLayerCompute(const BlobFormat& format, ActivationParams activation, int device)
      : hidden_{format.hidden},
        device_{device},
        ffn_{format, activation},
        scratch_{device},
        expert_out_{device} {
    const cuda::CurrentDevice current{device_};
    last_use_ = cuda::make_event(/*blocking=*/true);
    cudaStream_t stream = nullptr;  // the legacy one; later work waits for the event
    std::byte* scratch = scratch_.reserve(ffn_.scratch_bytes(), stream);
    SPMOE_CUDA_TRY(cudaMemsetAsync(scratch, 0, ffn_.scratch_bytes(), stream));
    record_use();
  }
  CudaLayerCompute(const CudaLayerCompute&) = delete;
  CudaLayerCompute& operator=(const CudaLayerCompute&) = delete;
  ~CudaLayerCompute() override { static_cast<void>(cudaEventSynchronize(last_use_.get())); }

  std::string_view name() const noexcept override { return "cuda"; }

  void begin(const LayerArgs& args) override {
    const cuda::CurrentDevice current{device_};
    if (args.consumer != args_.consumer) {
      SPMOE_CUDA_TRY(cudaStreamWaitEvent(stream_of(args), last_use_.get(), 0));
    }
    args_ = args;
    const std::size_t floats = std::size_t{args.tokens} * args.k * hidden_;
    rows_ = reinterpret_cast<float*>(expert_out_.reserve(floats * sizeof(float), stream_of(args)));
    record_use();  // the layer may be given up at any time, and the memory is of this stream now
  }

  void run(std::span<const ExpertTask> tasks) override {
    const cuda::CurrentDevice current{device_};
    try {
      ffn_.run(tasks, args_, rows_, scratch_.data());
    } catch (...) {  // what was enqueued before is in the memory still
      static_cast<void>(cudaEventRecord(last_use_.get(), stream_of(args_)));
      throw;
    }
    record_use();
  }

  void end() override {
    const cuda::CurrentDevice current{device_};
    ffn_.combine(args_, rows_);
    record_use();
  }

 private:
  static cudaStream_t stream_of(const LayerArgs& args) {
    return reinterpret_cast<cudaStream_t>(args.consumer);
  }
  void record_use() { SPMOE_CUDA_TRY(cudaEventRecord(last_use_.get(), stream_of(args_))); }

  const std::size_t hidden_;
  const int device_;
  cuda::ExpertFfn ffn_;
  StreamMemory scratch_;
  StreamMemory expert_out_;
  cuda::Event last_use_;  // of both memories
  LayerArgs args_;
  float* rows_ = nullptr;
};

}  // namespace

std::unique_ptr<LayerCompute> make_cuda_layer_compute(const BlobFormat& format,
                                                      ActivationParams activation,
                                                      int device_index) {
  require_cuda_device(device_index);
  return std::make_unique<CudaLayerCompute>(format, activation, device_index);
}

}  // namespace spmoe
