#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>

#include "device/cuda_marks.hpp"
#include "device/piece_mover.hpp"

namespace spmoe::cuda {

/// Which host memory is page-locked. Thread-safe.
class PinnedRanges {
 public:
  void add(const std::byte* data, std::size_t bytes);
  void remove(const std::byte* data) noexcept;
  [[nodiscard]] bool contains(const std::byte* data, std::size_t bytes) const;

 private:
  mutable std::mutex mutex_;
  std::map<const std::byte*, std::size_t> bytes_;  // by start
};

/// Copies over a stream of each mover's own. What rests in page-locked memory goes directly, the
/// rest through a ring of page-locked bounce buffers, one of which is read into while others are
/// copied from.
class Movers final : public PieceMovers {
 public:
  /// All arguments must outlive it. `piece_bytes` is the most bytes of one piece.
  Movers(int device_index, std::uint64_t piece_bytes, Marks& marks, const PinnedRanges& pinned);

  std::unique_ptr<PieceMover> make_mover() override;
  std::size_t window(StreamPriority priority) const override;
  std::uint64_t move_bytes(const Extent& src) const override;
  bool gathers(const Extent& src) const override { return is_pinned(src); }
  void make_consumer_wait(std::uintptr_t consumer, std::uintptr_t landing) override;

 private:
  [[nodiscard]] bool is_pinned(const Extent& src) const;

  const int device_index_;
  const std::uint64_t piece_bytes_;
  const std::uint64_t bounce_bytes_;
  Marks& marks_;
  const PinnedRanges& pinned_;
};

}  // namespace spmoe::cuda
