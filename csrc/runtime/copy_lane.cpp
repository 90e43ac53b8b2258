#include "runtime/copy_lane.hpp"

#include <utility>

#include "base/error.hpp"

namespace spmoe {

CopyLane::CopyLane(Device& device, StreamPriority priority, OnLanded on_landed)
    : stream_{device.make_stream(priority)},
      on_landed_{std::move(on_landed)},
      worker_{[this] { work(); }} {}

CopyLane::~CopyLane() {
  {
    const std::lock_guard lock{mutex_};
    stopping_ = true;
  }
  submitted_.notify_all();
  worker_.join();
}

void CopyLane::submit(const Fill& fill, std::span<const CopyOp> ops) {
  {
    const std::lock_guard lock{mutex_};
    Pending pending{fill, 0, {}};
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
  const std::lock_guard lock{mutex_};
  return pending_.size();
}

void CopyLane::work() {
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
    on_landed_(oldest.fill, oldest.error);
    lock.lock();
  }
}

}  // namespace spmoe
