#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <span>
#include <thread>

#include "base/ring.hpp"
#include "device/buffer.hpp"
#include "schedule/prefetch/prefetch_policy.hpp"

namespace spmoe {

/// Brings router scores from device memory to the host while nobody waits: they are copied into
/// pinned memory behind what made them, and a worker hands them on once that has passed.
/// Thread-safe. Must be destroyed before the device.
class ScoreReadback {
 public:
  struct Origin {
    std::uint16_t layer = 0;
    PredictionSource source = PredictionSource::draft;
    std::uint64_t epoch = 0;  ///< that they were made in
  };
  /// Gets the scores of each `send`, in order, on the worker.
  using OnScores = std::function<void(const Origin& origin, std::span<const float> scores)>;

  ScoreReadback(Device& device, std::size_t expert_count, std::size_t capacity, OnScores on_scores);
  ScoreReadback(const ScoreReadback&) = delete;
  ScoreReadback& operator=(const ScoreReadback&) = delete;
  ~ScoreReadback();  ///< hands on what is in flight

  /// Enqueues the copy of `from` [expert_count], in device memory, on `consumer`. Does not wait.
  /// Returns false, and drops them, if `capacity` of them are in flight: a late prediction is worth
  /// less than what it would hold up.
  /// @throws DeviceError.
  bool send(const Origin& origin, const float* from, std::uintptr_t consumer);

 private:
  struct Sent {
    Origin origin;
    EventId arrived = 0;
    std::size_t place = 0;
  };
  void work();
  [[nodiscard]] float* scores(std::size_t place) const;

  Device& device_;
  const std::size_t expert_count_;
  const std::size_t capacity_;
  const OnScores on_scores_;
  PinnedBuffer memory_;  // [capacity, expert_count]
  std::mutex mutex_;
  std::condition_variable sent_;
  Ring<Sent> in_flight_;
  std::size_t next_place_ = 0;
  bool stopping_ = false;
  std::thread worker_;
};

}  // namespace spmoe
