#pragma once

#include <condition_variable>
#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "base/ring.hpp"
#include "device/device.hpp"
#include "schedule/scheduler.hpp"

namespace spmoe {

/// A copy stream and the worker that waits for the ends of its fills. Thread-safe.
class CopyLane {
 public:
  /// A fill that has ended.
  struct Ended {
    Fill fill;
    BatchEnd end;
    double start_s;  ///< of `now_s`, when the lane turned to it
    double end_s;
  };
  /// Told of the end of each fill, on the worker, with no lock of the lane held.
  using OnEnd = std::function<void(const Ended& ended)>;

  CopyLane(Device& device, StreamPriority priority, OnEnd on_end);
  CopyLane(const CopyLane&) = delete;
  CopyLane& operator=(const CopyLane&) = delete;
  ~CopyLane();  ///< waits for the fills under way, and tells of them

  /// Starts `fills`, each of a slot of its own, all in one call to the device; `batches[i]` are
  /// the copies of `fills[i]`. Does not wait. If the device rejects them, the end of each tells so.
  /// Allocates nothing in steady state.
  void submit(std::span<const Fill> fills, std::span<const CopyBatch> batches);

  /// Withdraws or promotes the fill of `slot`, see `Stream`; nothing if this lane has none.
  void withdraw(SlotIndex slot);
  void promote(SlotIndex slot);

 private:
  struct Pending {
    Fill fill{};
    Fence fence = 0;
    double submitted_s = 0;
  };
  [[nodiscard]] const Pending* find(SlotIndex slot) const;
  void work();

  std::unique_ptr<Stream> stream_;
  OnEnd on_end_;
  std::mutex mutex_;
  std::condition_variable submitted_;
  std::vector<Pending> pending_;  // in the device
  Ring<Ended> rejected_;          // by the device, not told yet
  bool stopping_ = false;
  std::thread worker_;
};

}  // namespace spmoe
