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
  int driver_version = 13000;
  int compute_capability = 90;
  bool memory_pools = true;
  std::size_t memory_bytes = std::size_t{1} << 30;  ///< of the device
  std::size_t pinned_bytes = std::size_t{1} << 30;  ///< that can be page-locked
  cudaError_t device_count_status = cudaSuccess;    ///< what `cudaGetDeviceCount` says
  std::uint32_t delay_seed = 1;                     ///< of the time that work takes
  std::uint32_t max_delay_us = 30;
  /// Whether memory that nobody allocated here counts as the device's where a copy needs it to be:
  /// of another library, whose tensors play the device.
  bool foreign_device_memory = false;
};

/// Reports that a session left something behind or that something in it was out of order. Defined
/// by whoever links the runtime: the C++ tests fail.
void complain(const std::string& what);

/// The runtime from its start to its end. One at a time. Ends by complaining of what was left
/// behind and of what was out of order.
class Session {
 public:
  explicit Session(const Settings& settings = {});
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  ~Session();

  /// The n-th call of `function` from now on, from 1, returns `error` and does nothing.
  void fail(std::string_view function, std::uint64_t nth, cudaError_t error);

  /// Whose waits are left out, as if the backend had none: a planted mistake.
  enum class Wait { of_stream, of_host };
  /// From now on nothing waits that is of a stream which `which` picks: the stream itself for an
  /// event, or the host for an event recorded there.
  void forget(Wait wait, std::function<bool(cudaStream_t)> which);

  /// Nothing is forgotten any more, and all that was queued has run: before memory goes that a
  /// forgotten wait would have kept.
  void remember();

  /// The n-th copy to the device from now on is accepted, and fails in flight.
  void fail_copy_in_flight(std::uint64_t nth);

  /// The n-th copy to the device from now on breaks the context: it fails in flight, and every
  /// call from then on returns `error`. Memory, streams and events can still be given back.
  void lose_context_at_copy(std::uint64_t nth, cudaError_t error);

  /// Waits until all that was queued on `stream` has run, as an observer: no later work counts as
  /// ordered behind it for that.
  void observe_end(cudaStream_t stream);

  [[nodiscard]] std::uint64_t calls(std::string_view function) const;

  /// Accesses out of order so far; the end of the session no longer complains of it.
  [[nodiscard]] std::vector<std::string> take_violations();

  /// Objects that exist: streams, events, allocations.
  [[nodiscard]] std::string leftovers() const;
};

/// Enqueues `kernel` on `stream`, which reads device memory at `reads` and writes it at `writes`.
/// Like a launch, it may fail: its name for `Session::fail` is "cudaLaunchKernel".
cudaError_t launch(cudaStream_t stream, std::vector<std::span<const std::byte>> reads,
                   std::function<void()> kernel,
                   std::vector<std::span<const std::byte>> writes = {});

}  // namespace spmoe::fake_cuda
