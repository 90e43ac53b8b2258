#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "base/types.hpp"

namespace spmoe {

/// One copy of `src.bytes` bytes from where they rest into device memory.
struct CopyOp {
  std::byte* dst;
  Extent src;
};

/// Which of two waiting streams a busy link serves first.
enum class StreamPriority : std::uint8_t { prefetch, demand };

/// Queue of batches of copies. One thread submits; any thread may wait.
class Stream {
 public:
  virtual ~Stream() = default;

  /// Enqueues `ops` as one batch and returns, without waiting, the fence behind it.
  /// Copies of a batch run in no particular order, so destinations must not overlap.
  /// @throws DeviceError if the device rejects the batch; then none of it was enqueued.
  [[nodiscard]] virtual Fence copy_batch(std::span<const CopyOp> ops) = 0;

  /// Blocks the calling thread until every batch up to `fence` has ended.
  /// @throws DeviceError if a copy of the batch of `fence` itself failed; told once.
  virtual void wait(Fence fence) = 0;
};

/// What a link has done since the device was made.
struct LinkStats {
  std::uint64_t bytes = 0;  ///< moved by copies that succeeded
  double busy_s = 0;        ///< time in which at least one copy was under way
  /// The most bytes of prefetches that a demand ever had to let pass before it.
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
