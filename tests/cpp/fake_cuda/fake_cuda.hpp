#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

/// A CUDA runtime without a GPU. Device memory is memory, a stream is a thread that does late what
/// it is given, and every write and read of device memory is held against the order that streams,
/// events and waits of the host give it: what is only luckily in order is a violation.
namespace spmoe::fake_cuda {

struct Settings {
  int device_count = 1;
  std::size_t memory_bytes = std::size_t{1} << 30;  ///< of the device
  std::size_t pinned_bytes = std::size_t{1} << 30;  ///< that can be page-locked
  cudaError_t device_count_status = cudaSuccess;    ///< what `cudaGetDeviceCount` says
  std::uint32_t delay_seed = 1;                     ///< of the time that work takes
  std::uint32_t max_delay_us = 30;
};

/// The runtime from its start to its end. One at a time. Ends by checking, as a test failure, that
/// nothing was left behind and nothing was out of order.
class Session {
 public:
  explicit Session(const Settings& settings = {});
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  ~Session();

  /// The n-th call of `function` from now on, from 1, returns `error` and does nothing.
  void fail(std::string_view function, std::uint64_t nth, cudaError_t error);

  /// The n-th call from now on returns success and does nothing: a planted mistake of the caller.
  void skip(std::string_view function, std::uint64_t nth);

  /// Every call from now on does: the caller forgets it altogether.
  void skip_all(std::string_view function);

  /// The n-th copy from now on is accepted, and fails on its way.
  void fail_copy_on_its_way(std::uint64_t nth);

  [[nodiscard]] std::uint64_t calls(std::string_view function) const;

  /// What was out of order so far; the end of the session no longer complains of it.
  [[nodiscard]] std::vector<std::string> take_violations();

  /// What exists: streams, events, allocations.
  [[nodiscard]] std::string leftovers() const;
};

/// Enqueues `kernel` on `stream`, which reads device memory at `reads`. Like a launch, it may fail:
/// its name for `Session::fail` is "cudaLaunchKernel".
cudaError_t launch(cudaStream_t stream, std::vector<std::span<const std::byte>> reads,
                   std::function<void()> kernel);

}  // namespace spmoe::fake_cuda
