#pragma once

#include <condition_variable>
#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>

#include "base/ring.hpp"
#include "device/device.hpp"
#include "schedule/scheduler.hpp"

namespace spmoe {

/// A copy stream and the worker that waits for its fences, in order. Thread-safe.
class CopyLane {
 public:
  /// A fill that has ended; `error` is empty if every byte arrived.
  struct Landed {
    Fill fill;
    std::string error;
    double start_s;  ///< of `now_s`, when the lane turned to it
    double end_s;
  };
  /// Told of the end of each fill, on the worker, with no lock of the lane held.
  using OnLanded = std::function<void(const Landed& landed)>;

  CopyLane(Device& device, StreamPriority priority, OnLanded on_landed);
  CopyLane(const CopyLane&) = delete;
  CopyLane& operator=(const CopyLane&) = delete;
  ~CopyLane();  ///< waits for the fills under way, and tells of them

  /// Starts a fill. Does not wait. If the device rejects it, its end tells so. Allocates nothing
  /// in steady state.
  void submit(const Fill& fill, std::span<const CopyOp> ops);

  /// Fills submitted and not told of.
  [[nodiscard]] std::size_t in_flight() const;

 private:
  struct Pending {
    Fill fill{};
    Fence fence = 0;    // 0 if the device rejected the copies
    std::string error;  // why it did
    double submitted_s = 0;
  };
  void work();

  std::unique_ptr<Stream> stream_;
  OnLanded on_landed_;
  mutable std::mutex mutex_;
  std::condition_variable submitted_;
  Ring<Pending> pending_;
  bool stopping_ = false;
  std::thread worker_;
};

}  // namespace spmoe
