#include "device/cuda_device.hpp"

#include <cuda_runtime_api.h>

#include <string>

#include "base/bytes.hpp"
#include "base/error.hpp"
#include "device/copy_pool.hpp"
#include "device/cuda_handle.hpp"
#include "device/cuda_marks.hpp"
#include "device/cuda_movers.hpp"

namespace spmoe {
namespace {

// A copy of this size hides what it costs to hand it over, and is short beside a layer.
constexpr std::uint64_t cuda_piece_bytes = std::uint64_t{16} << 20;

cudaStream_t as_stream(std::uintptr_t consumer) { return reinterpret_cast<cudaStream_t>(consumer); }

class CudaDevice final : public Device {
 public:
  CudaDevice(int index, const DeviceOptions& options)
      : index_{index},
        name_{"cuda:" + std::to_string(index)},
        marks_{index},
        movers_{index, options.piece_bytes, marks_, pinned_},
        pool_{movers_, options} {}

  std::string_view name() const noexcept override { return name_; }

  std::byte* allocate(std::size_t bytes) override {
    const cuda::CurrentDevice device{index_};
    void* data = nullptr;
    const cudaError_t status = cudaMalloc(&data, bytes);
    if (status == cudaErrorMemoryAllocation) {
      static_cast<void>(cudaGetLastError());
      std::size_t free_bytes = 0;
      std::size_t total_bytes = 0;
      SPMOE_CUDA_TRY(cudaMemGetInfo(&free_bytes, &total_bytes));
      throw OutOfMemory{"no memory for " + format_bytes(bytes) + " on " + name_ + ": " +
                        format_bytes(free_bytes) + " free of " + format_bytes(total_bytes) +
                        "; lower expert_memory"};
    }
    cuda::check(status, "cudaMalloc");
    return static_cast<std::byte*>(data);
  }
  void deallocate(std::byte* data, std::size_t) noexcept override {
    static_cast<void>(cudaFree(data));
  }

  std::byte* allocate_pinned(std::size_t bytes) override {
    const cuda::CurrentDevice device{index_};
    void* data = nullptr;
    const cudaError_t status = cudaHostAlloc(&data, bytes, cudaHostAllocPortable);
    if (status != cudaSuccess) {
      static_cast<void>(cudaGetLastError());
      throw OutOfMemory{"no page-locked memory for " + format_bytes(bytes) + ": " +
                        cuda::describe(status) + "; lower pinned_memory"};
    }
    pinned_.add(static_cast<std::byte*>(data), bytes);
    return static_cast<std::byte*>(data);
  }
  void deallocate_pinned(std::byte* data, std::size_t) noexcept override {
    pinned_.remove(data);
    static_cast<void>(cudaFreeHost(data));
  }

  std::unique_ptr<Stream> make_stream(StreamPriority priority) override {
    return std::make_unique<PoolStream>(pool_, priority);
  }

  Mark mark(std::uintptr_t consumer) override {
    return marks_.record(as_stream(consumer), HostWait::sleep);
  }

  Mark read_back(std::byte* pinned, const void* data, std::size_t bytes, std::uintptr_t consumer,
                 HostWait how) override {
    const cuda::CurrentDevice device{index_};  // whose default stream it is, if it is that
    const cudaStream_t stream = as_stream(consumer);
    SPMOE_CUDA_TRY(cudaMemcpyAsync(pinned, data, bytes, cudaMemcpyDefault, stream));
    return marks_.record(stream, how);
  }
  void wait(Mark mark) override { marks_.wait(mark); }

  LinkStats link_stats() const override { return pool_.stats(); }
  void inject(const LinkFaults& faults) override { pool_.inject(faults); }

 private:
  const int index_;
  const std::string name_;
  cuda::PinnedRanges pinned_;
  cuda::Marks marks_;
  cuda::Movers movers_;
  CopyPool pool_;
};

}  // namespace

CudaStatus cuda_status() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return {count, {}};
  static_cast<void>(cudaGetLastError());
  if (status == cudaSuccess || status == cudaErrorNoDevice) {
    return {0, "there is no CUDA device here; use device=\"host\""};
  }
  const std::string version =
      std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  if (status == cudaErrorInsufficientDriver) {
    return {0, "there is no CUDA driver, or one too old for CUDA " + version +
                   ", which this spmoe was built with; install a newer one, or use "
                   "device=\"host\""};
  }
  return {0, "CUDA " + version + " does not start: " + cuda::describe(status)};
}

void require_cuda_device(int index) {
  const CudaStatus status = cuda_status();
  if (index >= 0 && index < status.device_count) return;
  throw DeviceError{status.device_count == 0
                        ? status.reason
                        : "cuda:" + std::to_string(index) + " asked, but there are " +
                              std::to_string(status.device_count) + " CUDA devices, from cuda:0"};
}

std::unique_ptr<Device> make_cuda_device(int index, const DeviceOptions& options) {
  check(options);
  require_cuda_device(index);
  DeviceOptions chosen = options;
  if (chosen.piece_bytes == 0) chosen.piece_bytes = cuda_piece_bytes;
  return std::make_unique<CudaDevice>(index, chosen);
}

}  // namespace spmoe
