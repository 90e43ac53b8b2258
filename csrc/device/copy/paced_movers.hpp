#pragma once

#include <algorithm>

#include "device/copy/held_movers.hpp"

namespace spmoe {

/// An adaptor that makes a link slower than it is. Each chunk gets a stretch of link time after the
/// chunk before it, no earlier than its copy was submitted, and holds its thread until that has
/// passed. A thread that waits for a core loses no link time, just as a copy engine in hardware
/// would not; a thread that waits for a disk does not either.
class PacedMovers final : public HeldMovers {
 public:
  /// @param gbps the link's speed in 10^9 bytes a second, above 0.
  PacedMovers(std::unique_ptr<ChunkMovers> upstream, double gbps)
      : HeldMovers{std::move(upstream)}, gbps_{gbps} {}

  Ticket admit(std::uint64_t bytes, Clock::time_point submitted, Clock::time_point) override {
    const std::chrono::duration<double> length{static_cast<double>(bytes) / (gbps_ * 1e9)};
    free_ = std::max(free_, submitted) + std::chrono::duration_cast<Clock::duration>(length);
    return {.until = free_};
  }

 private:
  const double gbps_;
  Clock::time_point free_ = at_once;  // when the link has moved all admitted chunks
};

}  // namespace spmoe
