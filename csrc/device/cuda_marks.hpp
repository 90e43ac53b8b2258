#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <mutex>
#include <vector>

#include "base/ring.hpp"
#include "device/cuda_handle.hpp"
#include "device/device.hpp"

namespace spmoe::cuda {

/// The marks that were made on consumers' streams, each an event from a pool until it has passed.
/// Thread-safe. Allocates nothing once it has seen its most open marks.
class Marks {
 public:
  explicit Marks(int device_index) : device_index_{device_index} {}

  // As `Device` says of `mark` and `wait`.
  [[nodiscard]] Mark record(cudaStream_t consumer, HostWait how);
  void wait(Mark mark);

  /// Later work on `stream` waits for `mark`. Nothing blocks.
  void make_stream_wait(cudaStream_t stream, Mark mark);

 private:
  struct Open {
    Event event;
    HostWait how = HostWait::sleep;
    int waiters = 0;  // on the host: until they are gone, the event stays what it is
  };

  void retire_passed();
  [[nodiscard]] Open* find(Mark mark);
  std::vector<Event>& free(HostWait how) { return free_[static_cast<std::size_t>(how)]; }

  const int device_index_;
  std::mutex mutex_;
  Ring<Open> open_;                         // the oldest first
  Mark first_ = 1;                          // of these
  std::array<std::vector<Event>, 2> free_;  // by how they are waited for
};

}  // namespace spmoe::cuda
