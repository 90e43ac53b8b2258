#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <mutex>
#include <vector>

#include "base/ring.hpp"
#include "device/cuda/handle.hpp"
#include "device/device.hpp"

namespace spmoe::cuda {

/// Events on the streams of consumers, from a pool to which each returns when it has passed.
/// Thread-safe. Allocates nothing once it has seen its most open events.
class ConsumerEvents {
 public:
  explicit ConsumerEvents(int device_index) : device_index_{device_index} {}

  // As `Device` says of `record_event` and `wait`.
  [[nodiscard]] EventId record(cudaStream_t consumer, HostWait how);
  void wait(EventId event);

  /// Later work on `stream` waits for `event`. Nothing blocks.
  void make_stream_wait(cudaStream_t stream, EventId event);

 private:
  struct Open {
    Event event;
    HostWait how = HostWait::sleep;
    int waiters = 0;  // on the host: until they are gone, the event stays what it is
  };

  void retire_passed();
  [[nodiscard]] Open* find(EventId event);
  std::vector<Event>& free(HostWait how) { return free_[static_cast<std::size_t>(how)]; }

  const int device_index_;
  std::mutex mutex_;
  Ring<Open> open_;                         // the oldest first
  EventId first_ = 1;                       // of these
  std::array<std::vector<Event>, 2> free_;  // by how they are waited for
};

}  // namespace spmoe::cuda
