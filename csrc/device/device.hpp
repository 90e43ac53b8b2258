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

/// Position on a stream of a consumer of the device's memory (a cudaStream_t, e.g. torch's): all
/// that was queued there before. 0 has passed, and so has every one on a device without streams.
using Mark = std::uint64_t;

/// How a thread waits for a mark: `spin` wakes at once, `sleep` leaves the core to others.
enum class HostWait : std::uint8_t { spin, sleep };

/// Copies that end together; their destinations must not overlap, for they run in no particular
/// order.
struct CopyBatch {
  std::span<const CopyOp> ops;
  Mark after = 0;  ///< they wait on the device until this has passed: who reads there has finished
};

/// What became of a batch.
struct BatchNotice {
  enum class What : std::uint8_t {
    issued,     ///< every copy is on its way: who orders itself behind them may read
    landed,     ///< every byte arrived
    withdrawn,  ///< some copies never began; none failed
    failed
  };
  Fence fence = 0;
  What what = What::landed;
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

  /// Blocks the calling thread until there is something new of a batch, and tells it. Each ends
  /// once, with anything but `issued`; then nothing is written to its destinations any more. Before
  /// that `issued` may be told, once. Only to be called while a batch has not been told as ended.
  [[nodiscard]] virtual BatchNotice next_notice() = 0;

  /// Later work on the stream `consumer` waits, on the device, for a batch that has been issued.
  /// Nothing blocks.
  virtual void make_consumer_wait(std::uintptr_t consumer, Fence fence) = 0;
};

/// What a link has done since the device was made.
struct LinkStats {
  std::uint64_t bytes = 0;  ///< moved by pieces that arrived
  double busy_s = 0;        ///< time in which at least one copy waited or was under way
  /// The most bytes of prefetches that a demand ever had to let pass before it, from when it was
  /// submitted or promoted.
  std::uint64_t prefetch_before_demand = 0;
};

/// Faults that tests plant in the link. All zero: none.
struct LinkFaults {
  std::uint64_t fail_at_copy = 0;  ///< the n-th piece copied from now on fails, once; 0: none
  std::uint32_t delay_seed = 0;    ///< with `max_delay_us`: pieces wait a seeded random time
  std::uint32_t max_delay_us = 0;
};

struct DeviceOptions {
  static constexpr unsigned max_copy_threads = 1024;
  static constexpr double min_link_gbps = 1e-6;  ///< a kilobyte a second
  unsigned copy_threads = 2;
  /// Bytes copied by one call; a larger copy is cut, so that threads share it and a demand waits
  /// for one piece at most. 0: the device's own choice.
  std::uint64_t piece_bytes = 0;
  double link_gbps = 0;  ///< paces the link to so many 10^9 bytes a second; 0: unpaced
  LinkFaults faults{};
};

/// @throws InvalidArgument if there are no copy threads or too many, or if `link_gbps` is neither 0
///         nor a number from `min_link_gbps`.
void check(const DeviceOptions& options);

/// Memory and streams of one processor. Thread-safe. Everything it creates must be destroyed
/// before it.
class Device {
 public:
  virtual ~Device() = default;

  [[nodiscard]] virtual std::string_view name() const noexcept = 0;  ///< "host" or "cuda:<index>"

  /// Device memory, aligned to 256 bytes. @throws OutOfMemory, naming the bytes asked.
  [[nodiscard]] virtual std::byte* allocate(std::size_t bytes) = 0;
  virtual void deallocate(std::byte* data, std::size_t bytes) noexcept = 0;

  /// Host memory that the device copies from and to by itself. @throws OutOfMemory.
  [[nodiscard]] virtual std::byte* allocate_pinned(std::size_t bytes) = 0;
  virtual void deallocate_pinned(std::byte* data, std::size_t bytes) noexcept = 0;

  [[nodiscard]] virtual std::unique_ptr<Stream> make_stream(StreamPriority priority) = 0;

  /// Marks the present end of the queue of `consumer`. @throws DeviceError.
  [[nodiscard]] virtual Mark mark(std::uintptr_t consumer) = 0;

  /// Enqueues on `consumer` a copy of device memory into pinned memory, and marks its end, for
  /// which `wait` waits as `how` says. @throws DeviceError.
  [[nodiscard]] virtual Mark read_back(std::byte* pinned, const void* data, std::size_t bytes,
                                       std::uintptr_t consumer, HostWait how) = 0;

  /// Blocks the calling thread until `mark` has passed. @throws DeviceError if work before failed.
  virtual void wait(Mark mark) = 0;

  /// Why this process can never use the device again, and the cure; empty while it can. To be asked
  /// after a failure; waits for nothing.
  [[nodiscard]] virtual std::string lost() const = 0;

  [[nodiscard]] virtual LinkStats link_stats() const = 0;

  /// Replaces the planted faults and restarts their count.
  virtual void inject(const LinkFaults& faults) = 0;
};

}  // namespace spmoe
