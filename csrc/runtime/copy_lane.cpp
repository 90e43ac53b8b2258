#include "runtime/copy_lane.hpp"

#include <algorithm>
#include <utility>

#include "base/error.hpp"
#include "base/trace.hpp"

namespace spmoe {

CopyLane::CopyLane(Device& device, StreamPriority priority, OnLanded on_landed)
    : stream_{device.make_stream(priority)},
      on_landed_{std::move(on_landed)},
      worker_{[this] { work(); }} {}

CopyLane::~CopyLane() {
  {
    const std::scoped_lock lock{mutex_};
    stopping_ = true;
  }
  submitted_.notify_all();
  worker_.join();
}

void CopyLane::submit(const Fill& fill, std::span<const CopyOp> ops) {
  {
    const std::scoped_lock lock{mutex_};
    Pending pending{fill, 0, {}, now_s()};
    try {
      pending.fence = stream_->copy_batch(ops);
    } catch (const DeviceError& rejected) {
      pending.error = rejected.what();
    }
    pending_.push(std::move(pending));
  }
  submitted_.notify_one();
}

std::size_t CopyLane::in_flight() const {
  const std::scoped_lock lock{mutex_};
  return pending_.size();
}

void CopyLane::work() {
  double last_end_s = 0;
  std::unique_lock lock{mutex_};
  while (true) {
    submitted_.wait(lock, [this] { return stopping_ || !pending_.empty(); });
    if (pending_.empty()) return;
    Pending oldest = pending_.front();
    lock.unlock();
    try {
      stream_->wait(oldest.fence);
    } catch (const DeviceError& failure) {
      oldest.error = failure.what();
    }
    lock.lock();
    pending_.pop();
    lock.unlock();
    const double start_s = std::max(oldest.submitted_s, last_end_s);
    last_end_s = now_s();
    on_landed_({oldest.fill, oldest.error, start_s, last_end_s});
    lock.lock();
  }
}

}  // namespace spmoe
