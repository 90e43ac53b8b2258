#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "device/chunk_mover.hpp"

namespace spmoe {

class Device;
class FaultPlan;

struct CopyOptions {
  static constexpr unsigned max_copy_threads = 1024;
  static constexpr double min_link_gbps = 1e-6;  ///< a kilobyte a second
  unsigned copy_threads = 2;
  /// The most bytes of a chunk; a larger copy is cut, so that threads share it and a demand waits
  /// for one chunk at most. 0: the device's own choice.
  std::uint64_t chunk_bytes = 0;
  double link_gbps = 0;  ///< paces the link to so many 10^9 bytes a second; 0: unpaced
  std::shared_ptr<FaultPlan> faults{};  ///< for tests; none: the link is as good as it is
};

/// @throws InvalidArgument if there are no copy threads or too many, or if `link_gbps` is neither 0
///         nor a number from `min_link_gbps`.
void check(const CopyOptions& options);

/// The movers of `device`, which must outlive them, with the adaptors that `options` ask for.
/// @throws InvalidArgument as `check`.
[[nodiscard]] std::unique_ptr<ChunkMovers> make_movers(Device& device, const CopyOptions& options);

/// One copy into a slot.
struct SlotCopy {
  SlotIndex slot = 0;
  CopyPriority priority = CopyPriority::demand;
  std::byte* dst = nullptr;  ///< the extents go there one behind the other, in no order of time
  std::span<const Extent> extents;  ///< at least a byte in all; must outlive the copy
  EventId after = 0;  ///< the copy waits on the device for this: who reads there has finished
};

/// News of a copy.
struct Completion {
  enum class Outcome : std::uint8_t {
    issued,     ///< every chunk is in flight: a consumer may read behind `make_consumer_wait`
    arrived,    ///< every byte arrived
    cancelled,  ///< some chunks never began; none failed
    failed
  };
  SlotIndex slot = 0;
  Outcome outcome = Outcome::arrived;
  std::uint64_t bytes_moved = 0;  ///< in chunks that arrived, as `LinkStats::bytes` counts them
  std::string error;              ///< of one chunk that failed; empty unless `failed`
  std::chrono::steady_clock::time_point submitted;
};

/// Work of a link since its engine was made.
struct LinkStats {
  std::uint64_t bytes = 0;  ///< moved by chunks that arrived
  double busy_s = 0;        ///< time in which at least one copy waited or was in flight
  /// The most bytes of prefetches that a demand ever had to let pass before it, from when it was
  /// submitted or promoted.
  std::uint64_t prefetch_before_demand = 0;
};

/// Copies blobs into slots: demands before prefetches, within one priority in order of submission.
/// At most one copy a slot. A chunk is cut when a thread is free for it, so that the rest of a copy
/// can be cancelled or promoted as a whole. A copy ends once: arrived, cancelled or failed; nothing
/// is written to its destination afterwards. `issued` may come before that, once.
///
/// Thread-safe. No lock of the engine is held while it calls `on_completion`, on a copy thread, or
/// while bytes move. Allocates nothing once every slot has been filled.
class CopyEngine {
 public:
  /// Gets the completions of one slot one after the other, in order. May call the engine.
  using OnCompletion = std::function<void(const Completion& completion)>;

  /// @param slot_count slots are below this.
  /// @throws InvalidArgument as `check`.
  CopyEngine(std::unique_ptr<ChunkMovers> movers, SlotIndex slot_count, const CopyOptions& options,
             OnCompletion on_completion);
  CopyEngine(const CopyEngine&) = delete;
  CopyEngine& operator=(const CopyEngine&) = delete;
  ~CopyEngine();  ///< as `close`

  /// Starts `copies` and returns without waiting for them.
  /// @throws std::logic_error if a slot has a copy that has not ended, or a copy has no byte; then
  ///         nothing was started.
  void submit(std::span<const SlotCopy> copies);

  /// Drops the chunks of a slot's copy that have not begun; those in flight finish. Has no effect
  /// if all chunks have begun or there is no copy. If nothing was in flight the copy ends here:
  /// returns its completion, and `on_completion` is not called for it.
  [[nodiscard]] std::optional<Completion> cancel(SlotIndex slot);

  /// The chunks of a slot's copy that have not begun go before all prefetches, behind the demands
  /// that wait now. Has no effect where `cancel` has none.
  void promote(SlotIndex slot);

  /// Later work on the stream `consumer` waits, on the device, for the copy of `slot` if that has
  /// been issued and has not ended. Nothing blocks.
  void make_consumer_wait(std::uintptr_t consumer, SlotIndex slot);

  /// Blocks until every copy has ended, and ends the threads. No copy may be submitted from then
  /// on. May be called twice.
  void close();

  [[nodiscard]] LinkStats stats() const;

 private:
  using Clock = std::chrono::steady_clock;
  struct Copy;
  struct Chunk;

  [[nodiscard]] bool can_begin(std::size_t in_flight) const;
  void enqueue(Copy& copy);
  void serve(ChunkMover& mover);
  void cut(Chunk& chunk);
  std::uint64_t cut_part(Copy& copy, std::uint64_t most_bytes, Chunk& chunk);
  void note_begun(const Chunk& chunk, std::vector<Completion>& completions);
  void note_finished(const Chunk& chunk, std::vector<Completion>& completions);
  [[nodiscard]] Completion end(Copy& copy);

  const std::unique_ptr<ChunkMovers> movers_;
  const std::uint64_t chunk_bytes_;
  const std::uint64_t prefetch_chunk_bytes_;
  const OnCompletion on_completion_;
  mutable std::mutex mutex_;  // guards what follows, up to `each_mover_`
  std::condition_variable work_;
  std::vector<Copy> copies_;     // by slot
  std::vector<Copy*> waiting_;   // with chunks to begin, in order of service; small: shifts win
  std::size_t copies_open_ = 0;  // not ended
  LinkStats stats_;
  std::uint64_t prefetch_started_ = 0;    // bytes
  std::uint64_t prefetch_in_flight_ = 0;  // of these
  Clock::time_point busy_from_;
  bool closing_ = false;
  std::vector<std::unique_ptr<ChunkMover>> each_mover_;  // by thread
  std::vector<std::thread> threads_;
};

}  // namespace spmoe
