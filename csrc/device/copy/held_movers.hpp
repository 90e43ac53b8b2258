#pragma once

#include <chrono>
#include <memory>
#include <utility>

#include "device/chunk_mover.hpp"

namespace spmoe {

/// An adaptor: the chunks of `upstream`, one part and one chunk at a time for each thread, each
/// held until a time. Chunks have no arrival event, so that no consumer reads one before that time.
class HeldMovers : public ChunkMovers {
 public:
  using Clock = ChunkMover::Clock;

  /// Before every time that the clock shows, wherever its origin is.
  static constexpr Clock::time_point at_once = Clock::time_point::min();

  /// Plan for a chunk.
  struct Ticket {
    Clock::time_point until = at_once;  ///< the chunk ends no earlier
    bool fail = false;                  ///< the chunk does not begin
  };

  explicit HeldMovers(std::unique_ptr<ChunkMovers> upstream) : upstream_{std::move(upstream)} {}

  /// The ticket of the next chunk; see `ChunkMover::reserve`.
  [[nodiscard]] virtual Ticket admit(std::uint64_t bytes, Clock::time_point submitted,
                                     Clock::time_point now) = 0;

  std::unique_ptr<ChunkMover> make_mover() override;
  std::uint64_t chunk_bytes() const override { return upstream_->chunk_bytes(); }
  std::size_t window(CopyPriority) const override { return 1; }
  std::uint64_t part_bytes(const Extent& src) const override { return upstream_->part_bytes(src); }
  bool gathers(const Extent&) const override { return false; }
  void make_consumer_wait(std::uintptr_t, std::uintptr_t) override {}

 private:
  const std::unique_ptr<ChunkMovers> upstream_;
};

}  // namespace spmoe
