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
#include "device/link_pacer.hpp"
#include "device/piece_mover.hpp"

namespace spmoe {

/// Threads that copy piece by piece for all streams of a device: those of demands first, within
/// one priority batch after batch. A piece is cut when a thread is free for it, so that what waits
/// can be withdrawn or promoted as a whole. Thread-safe. Allocates nothing once it has seen its
/// most batches.
class CopyPool {
 public:
  struct Batch;

  /// One stream's batches and what is to be told of them. Guarded by the pool; waits for all its
  /// batches to end.
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
    std::vector<Batch*> open_;   // not ended
    Ring<BatchNotice> notices_;  // not told
    std::condition_variable told_;
  };

  /// @param movers move its pieces, and must outlive it. `options` as `check` allows, with
  ///        `piece_bytes` above 0.
  CopyPool(PieceMovers& movers, const DeviceOptions& options);
  CopyPool(const CopyPool&) = delete;
  CopyPool& operator=(const CopyPool&) = delete;
  ~CopyPool();  ///< serves all that waits

  // As `Stream` says.
  Fence submit(Channel& channel, std::span<const CopyBatch> batches);
  void withdraw(Channel& channel, Fence fence);
  void promote(Channel& channel, Fence fence);
  BatchNotice next_notice(Channel& channel);
  void make_consumer_wait(Channel& channel, std::uintptr_t consumer, Fence fence);

  void inject(const LinkFaults& faults);
  [[nodiscard]] LinkStats stats() const;

 private:
  using Clock = std::chrono::steady_clock;
  using Queue = std::vector<Batch*>;  // in the order of service; small, so plain shifts win

  struct Piece;

  Queue& queue(StreamPriority priority) { return queues_[static_cast<std::size_t>(priority)]; }
  [[nodiscard]] bool busy() const { return free_.size() < batches_.size(); }
  [[nodiscard]] std::size_t window(StreamPriority priority) const;
  [[nodiscard]] Queue* startable(std::size_t under_way);
  [[nodiscard]] static Batch* find_waiting(Channel& channel, Fence fence);
  [[nodiscard]] Batch& add(Channel& channel, const CopyBatch& copies);
  void serve(PieceMover& mover);
  void stop();
  void cut_piece(Queue& queue, Piece& piece);
  std::uint64_t cut_move(Batch& batch, std::uint64_t most_bytes, Piece& piece);
  void note_begun(const Piece& piece);
  void finish(Piece& piece);
  void end_if_done(Batch& batch);

  PieceMovers& movers_;
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
  bool stopping_ = false;
  std::vector<std::unique_ptr<PieceMover>> each_mover_;  // by thread
  std::vector<std::thread> threads_;
};

/// A stream whose batches go through a pool, which must outlive it.
class PoolStream final : public Stream {
 public:
  PoolStream(CopyPool& pool, StreamPriority priority) : pool_{pool}, channel_{pool, priority} {}

  Fence submit(std::span<const CopyBatch> batches) override {
    return pool_.submit(channel_, batches);
  }
  void withdraw(Fence fence) override { pool_.withdraw(channel_, fence); }
  void promote(Fence fence) override { pool_.promote(channel_, fence); }
  BatchNotice next_notice() override { return pool_.next_notice(channel_); }
  void make_consumer_wait(std::uintptr_t consumer, Fence fence) override {
    pool_.make_consumer_wait(channel_, consumer, fence);
  }

 private:
  CopyPool& pool_;
  CopyPool::Channel channel_;
};

}  // namespace spmoe
