#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "base/types.hpp"

namespace spmoe {

/// One copy of `src.bytes` bytes from where they rest into device memory.
struct CopyOp {
  std::byte* dst;
  Extent src;
};

/// Which of the batches that wait a busy link serves first: the demands.
enum class StreamPriority : std::uint8_t { prefetch, demand };

/// Copies that end together; their destinations must not overlap, for they run in no particular
/// order.
using CopyBatch = std::span<const CopyOp>;

/// How a batch ended. Nothing is written to its destinations any more.
struct BatchEnd {
  enum class How : std::uint8_t {
    landed,     ///< every byte arrived
    withdrawn,  ///< some never began; none failed
    failed
  };
  Fence fence = 0;
  How how = How::landed;
  std::uint64_t bytes_moved = 0;  ///< by its pieces that arrived, as `LinkStats::bytes` counts them
  std::string error;              ///< of one piece that failed; empty unless `failed`
};

/// Batches of copies on their way to a device. Each is cut into pieces and goes through the states
/// waiting -> under way -> ended; `withdraw` shortens the way. Batches begin in the order in which
/// they were submitted, save the promoted ones. They may end in any order, each by itself: the end
/// of one says nothing about those before it. Thread-safe. Its destruction waits for every batch.
class Stream {
 public:
  virtual ~Stream() = default;

  /// Enqueues `batches` and returns without waiting for them. `batches[i]` is known by the fence
  /// returned plus i; fences count up from 1. The spans need not outlive the call.
  /// @throws DeviceError if the device rejects them; then none was enqueued.
  [[nodiscard]] virtual Fence submit(std::span<const CopyBatch> batches) = 0;

  /// Drops the pieces of a batch that have not begun; those under way finish. Its end is told like
  /// any other, at once if nothing is under way. Has no effect on one whose pieces have all begun,
  /// or that has ended.
  virtual void withdraw(Fence fence) = 0;

  /// The pieces of a batch that have not begun go before all that waits with the priority of a
  /// prefetch, and behind the demands that wait now. Has no effect where `withdraw` has none.
  virtual void promote(Fence fence) = 0;

  /// Blocks the calling thread until a batch has ended whose end was not told yet, and tells it:
  /// each once, in the order of ending. Only to be called when there is such a batch.
  [[nodiscard]] virtual BatchEnd next_end() = 0;
};

/// What a link has done since the device was made.
struct LinkStats {
  std::uint64_t bytes = 0;  ///< moved by pieces that arrived
  double busy_s = 0;        ///< time in which at least one copy was under way
  /// The most bytes of prefetches that a demand ever had to let pass before it, from when it was
  /// submitted or promoted.
  std::uint64_t prefetch_before_demand = 0;
};

/// Memory and streams of one processor. Thread-safe. Everything it creates must be destroyed
/// before it.
class Device {
 public:
  virtual ~Device() = default;

  [[nodiscard]] virtual std::string_view name() const noexcept = 0;  ///< "host" or "cuda:<index>"

  /// Device memory, aligned to 4096 bytes. @throws OutOfMemory, naming the bytes asked.
  [[nodiscard]] virtual std::byte* allocate(std::size_t bytes) = 0;
  virtual void deallocate(std::byte* data, std::size_t bytes) noexcept = 0;

  [[nodiscard]] virtual std::unique_ptr<Stream> make_stream(StreamPriority priority) = 0;

  [[nodiscard]] virtual LinkStats link_stats() const = 0;
};

}  // namespace spmoe
