#include "device/cuda/cuda_device.hpp"

#include <cuda_runtime_api.h>

#include <string>

#include "base/bytes.hpp"
#include "base/error.hpp"
#include "device/cuda/events.hpp"
#include "device/cuda/handle.hpp"
#include "device/cuda/movers.hpp"

namespace spmoe {
namespace {

// A copy of this size hides what it costs to hand it over, and is short beside a layer.
constexpr std::uint64_t cuda_chunk_bytes = std::uint64_t{16} << 20;

constexpr int least_compute_capability = 8;  // what the kernels are compiled for, at least

cudaStream_t as_stream(std::uintptr_t consumer) { return reinterpret_cast<cudaStream_t>(consumer); }

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int index)
      : index_{index}, name_{"cuda:" + std::to_string(index)}, events_{index} {}

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

  std::unique_ptr<ChunkMovers> make_movers(std::uint64_t chunk_bytes) override {
    return std::make_unique<cuda::Movers>(index_, chunk_bytes == 0 ? cuda_chunk_bytes : chunk_bytes,
                                          events_, pinned_);
  }

  EventId record_event(std::uintptr_t consumer) override {
    return events_.record(as_stream(consumer), HostWait::sleep);
  }

  EventId read_back(std::byte* pinned, const void* data, std::size_t bytes, std::uintptr_t consumer,
                    HostWait how) override {
    const cuda::CurrentDevice device{index_};  // whose default stream it is, if it is that
    cudaStream_t stream = as_stream(consumer);
    SPMOE_CUDA_TRY(cudaMemcpyAsync(pinned, data, bytes, cudaMemcpyDefault, stream));
    return events_.record(stream, how);
  }
  void wait(EventId event) override { events_.wait(event); }

  std::string lost() const override {
    const cudaError_t status = cuda::context_status(index_);
    if (status == cudaSuccess) return {};
    return name_ + " is lost to this process, for an error broke its CUDA context (" +
           cuda::describe(status) + "): restart the process";
  }

 private:
  const int index_;
  const std::string name_;
  cuda::PinnedRanges pinned_;
  cuda::ConsumerEvents events_;
};

/// "13.0" of 13000.
std::string cuda_version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

std::string describe_driver(const std::string& built) {
  int driver = 0;
  static_cast<void>(cudaDriverGetVersion(&driver));  // 0 without a driver
  static_cast<void>(cudaGetLastError());
  const std::string found =
      driver == 0 ? "there is no CUDA driver here, and this spmoe needs one for CUDA " + built
                  : "the driver here is for CUDA " + cuda_version(driver) +
                        ", but this spmoe was built with CUDA " + built;
  return found + "; install a driver for CUDA " + built +
         " or newer, build spmoe with an older CUDA toolkit, or use device=\"host\"";
}

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  SPMOE_CUDA_TRY(cudaDeviceGetAttribute(&value, which, index));
  return value;
}

/// Features that a device lacks and that the kernels and their memory need; empty if none.
std::string describe_lack(int index) {
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, index);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, index);
  std::string lack;
  if (major < least_compute_capability) {
    lack = "has compute capability " + std::to_string(major) + "." + std::to_string(minor) +
           ", but spmoe's kernels need " + std::to_string(least_compute_capability) +
           ".0 (Ampere) or newer";
  } else if (attribute(cudaDevAttrMemoryPoolsSupported, index) == 0) {
    lack = "has no memory pools, which spmoe allocates from; its driver may have switched them off";
  } else {
    return {};
  }
  cudaDeviceProp properties{};
  SPMOE_CUDA_TRY(cudaGetDeviceProperties(&properties, index));
  return "cuda:" + std::to_string(index) + " (" + properties.name + ") " + lack +
         "; use another device, or device=\"host\"";
}

}  // namespace

CudaStatus cuda_status() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return {count, {}};
  static_cast<void>(cudaGetLastError());
  if (status == cudaSuccess || status == cudaErrorNoDevice) {
    return {0, "there is no CUDA device here; use device=\"host\""};
  }
  const std::string built = cuda_version(CUDART_VERSION);
  if (status == cudaErrorInsufficientDriver) return {0, describe_driver(built)};
  return {0, "CUDA " + built + " does not start: " + cuda::describe(status)};
}

std::string cuda_device_problem(int index) {
  const CudaStatus status = cuda_status();
  if (status.device_count == 0) return status.reason;
  if (index < 0 || index >= status.device_count) {
    return "cuda:" + std::to_string(index) + " asked, but there are " +
           std::to_string(status.device_count) + " CUDA devices, from cuda:0";
  }
  try {
    return describe_lack(index);
  } catch (const DeviceError& error) {
    return "cuda:" + std::to_string(index) + " does not answer: " + error.what() +
           "; see what nvidia-smi says of it, or use device=\"host\"";
  }
}

void require_cuda_device(int index) {
  if (const std::string problem = cuda_device_problem(index); !problem.empty()) {
    throw DeviceError{problem};
  }
}

std::unique_ptr<Device> make_cuda_device(int index) {
  require_cuda_device(index);
  return std::make_unique<CudaDevice>(index);
}

}  // namespace spmoe
