#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>

#include "device/chunk_mover.hpp"
#include "device/cuda/events.hpp"

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

/// Copies over a stream of each mover's own. Bytes in page-locked memory go directly, others
/// through a ring of page-locked bounce buffers, one of which is read into while others are copied
/// from.
class Movers final : public ChunkMovers {
 public:
  /// All arguments must outlive it. `chunk_bytes` is the most bytes of one chunk.
  Movers(int device_index, std::uint64_t chunk_bytes, ConsumerEvents& events,
         const PinnedRanges& pinned);

  std::unique_ptr<ChunkMover> make_mover() override;
  std::uint64_t chunk_bytes() const override { return chunk_bytes_; }
  std::size_t window(CopyPriority priority) const override;
  std::uint64_t part_bytes(const Extent& src) const override;
  bool gathers(const Extent& src) const override { return is_pinned(src); }
  void make_consumer_wait(std::uintptr_t consumer, std::uintptr_t arrival) override;

 private:
  [[nodiscard]] bool is_pinned(const Extent& src) const;

  const int device_index_;
  const std::uint64_t chunk_bytes_;
  const std::uint64_t bounce_bytes_;
  ConsumerEvents& events_;
  const PinnedRanges& pinned_;
};

}  // namespace spmoe::cuda
