#pragma once

#include <array>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "base/ring.hpp"
#include "device/device.hpp"
#include "device/host_device.hpp"
#include "device/link_pacer.hpp"

namespace spmoe {

/// Threads that copy piece by piece for all streams of a device: those of demands first, within
/// one priority batch after batch. A piece is cut when a thread is free for it, so that what waits
/// can be withdrawn or promoted as a whole. Thread-safe. Allocates nothing once it has seen its
/// most batches.
class CopyPool {
 public:
  struct Batch;

  /// One stream's batches and their ends. Guarded by the pool; waits for all its batches to end.
  class Channel {
   public:
    Channel(CopyPool& pool, StreamPriority priority) : pool_{pool}, priority_{priority} {}
    Channel(const Channel&) = delete;
    Channel& operator=(const Channel&) = delete;
    ~Channel();

   private:
    friend class CopyPool;
    CopyPool& pool_;
    const StreamPriority priority_;
    Fence next_ = 1;
    std::vector<Batch*> open_;  // not ended
    Ring<BatchEnd> ends_;       // not told
    std::condition_variable ended_;
  };

  explicit CopyPool(const HostDeviceOptions& options);
  CopyPool(const CopyPool&) = delete;
  CopyPool& operator=(const CopyPool&) = delete;
  ~CopyPool();  ///< serves all that waits

  // As `Stream` says.
  Fence submit(Channel& channel, std::span<const CopyBatch> batches);
  void withdraw(Channel& channel, Fence fence);
  void promote(Channel& channel, Fence fence);
  BatchEnd next_end(Channel& channel);

  void inject(const LinkFaults& faults);
  [[nodiscard]] LinkStats stats() const;

 private:
  using Clock = std::chrono::steady_clock;
  using Queue = std::vector<Batch*>;  // in the order of service; small, so plain shifts win

  struct Piece {
    CopyOp op;
    Batch* batch;
    StreamPriority priority;
  };

  Queue& queue(StreamPriority priority) { return queues_[static_cast<std::size_t>(priority)]; }
  [[nodiscard]] Batch* waiting();
  [[nodiscard]] Batch* find_waiting(Channel& channel, Fence fence);
  [[nodiscard]] Batch& add(Channel& channel, CopyBatch ops);
  [[nodiscard]] Piece begin_piece(Batch& batch);
  void serve();
  void finish(const Piece& piece, std::string error);
  void end_if_done(Batch& batch);

  const std::uint64_t piece_bytes_;
  const std::uint64_t prefetch_piece_bytes_;
  mutable std::mutex mutex_;
  std::condition_variable work_;
  std::array<Queue, 2> queues_;                  // of batches with pieces to begin, by priority
  std::vector<std::unique_ptr<Batch>> batches_;  // all there ever were
  std::vector<Batch*> free_;
  LinkPacer pacer_;
  LinkStats stats_;
  std::uint64_t prefetch_started_ = 0;  // bytes
  std::uint64_t prefetch_active_ = 0;   // of these, under way
  Clock::time_point busy_from_;
  unsigned active_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace spmoe
