#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <utility>

#include "base/error.hpp"

namespace spmoe::cuda {

/// "cudaErrorName (what the runtime says of it)".
[[nodiscard]] inline std::string describe(cudaError_t status) {
  return std::string{cudaGetErrorName(status)} + " (" + cudaGetErrorString(status) + ")";
}

/// Throws `DeviceError` naming `call` unless `status` is success. Clears the calling thread's last
/// error first. Whether the device still works after it, `context_status` says.
inline void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());
  throw DeviceError{std::string{call} + ": " + describe(status)};
}
#define SPMOE_CUDA_TRY(call) ::spmoe::cuda::check((call), #call)

/// Success while this process can use a device. An error that broke its context for good, such as
/// an illegal address or memory that failed, is returned by this and every later call. Waits for
/// nothing, and leaves the calling thread's current device and last error clean.
[[nodiscard]] inline cudaError_t context_status(int index) {
  int before = 0;
  cudaError_t status = cudaGetDevice(&before);
  if (status == cudaSuccess) {
    status = cudaSetDevice(index);
    if (status == cudaSuccess) status = cudaStreamQuery(nullptr);
    static_cast<void>(cudaSetDevice(before));
  }
  static_cast<void>(cudaGetLastError());
  return status == cudaErrorNotReady ? cudaSuccess : status;
}

/// Sole owner of one CUDA runtime handle. Move-only; an empty handle is null.
template <class Handle, cudaError_t (*Destroy)(Handle)>
class UniqueHandle {
 public:
  UniqueHandle() = default;
  explicit UniqueHandle(Handle handle) noexcept : handle_{handle} {}
  UniqueHandle(UniqueHandle&& other) noexcept : handle_{std::exchange(other.handle_, nullptr)} {}
  UniqueHandle& operator=(UniqueHandle&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  // Status ignored: at process exit the driver may already be gone (cudaErrorCudartUnloading).
  ~UniqueHandle() {
    if (handle_ != nullptr) static_cast<void>(Destroy(handle_));
  }

  [[nodiscard]] Handle get() const noexcept { return handle_; }

 private:
  Handle handle_ = nullptr;
};

using Stream = UniqueHandle<cudaStream_t, cudaStreamDestroy>;
using Event = UniqueHandle<cudaEvent_t, cudaEventDestroy>;

/// The highest-priority stream that does not synchronise with the legacy default stream.
inline Stream make_stream() {
  int least = 0;
  int greatest = 0;
  SPMOE_CUDA_TRY(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  cudaStream_t raw = nullptr;
  SPMOE_CUDA_TRY(cudaStreamCreateWithPriority(&raw, cudaStreamNonBlocking, greatest));
  return Stream{raw};
}

/// Event without timing; who waits for it on the host sleeps if `blocking`, and spins otherwise.
/// One that was never recorded has passed.
inline Event make_event(bool blocking) {
  cudaEvent_t raw = nullptr;
  const unsigned flags = cudaEventDisableTiming | (blocking ? cudaEventBlockingSync : 0U);
  SPMOE_CUDA_TRY(cudaEventCreateWithFlags(&raw, flags));
  return Event{raw};
}

/// Makes a device the calling thread's current one for as long as it lives.
class CurrentDevice {
 public:
  explicit CurrentDevice(int index) {
    SPMOE_CUDA_TRY(cudaGetDevice(&before_));
    if (before_ != index) SPMOE_CUDA_TRY(cudaSetDevice(index));
    changed_ = before_ != index;
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
  ~CurrentDevice() {
    if (changed_) static_cast<void>(cudaSetDevice(before_));
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace spmoe::cuda
