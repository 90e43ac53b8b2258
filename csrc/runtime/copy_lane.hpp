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

/// A copy stream and the worker that waits for news of its fills. Thread-safe.
class CopyLane {
 public:
  /// What became of a fill.
  struct FillNotice {
    Fill fill;
    BatchNotice batch;
    double start_s;  ///< of `now_s`, when the lane turned to it
    double end_s;
  };
  /// Told of each fill as `Stream::next_notice` is, on the worker, with no lock of the lane held.
  using OnNotice = std::function<void(const FillNotice& notice)>;

  CopyLane(Device& device, StreamPriority priority, OnNotice on_notice);
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

  /// Later work on the stream `consumer` waits, on the device, for the fill of `slot` if this lane
  /// has issued one. Nothing blocks.
  void make_consumer_wait(std::uintptr_t consumer, SlotIndex slot);

 private:
  struct Pending {
    Fill fill{};
    Fence fence = 0;
    double submitted_s = 0;
  };
  [[nodiscard]] const Pending* find(SlotIndex slot) const;
  void work();

  std::unique_ptr<Stream> stream_;
  OnNotice on_notice_;
  std::mutex mutex_;
  std::condition_variable submitted_;
  std::vector<Pending> pending_;  // in the device
  Ring<FillNotice> rejected_;     // by the device, not told yet
  bool stopping_ = false;
  std::thread worker_;
};

}  // namespace spmoe
