#include "runtime/copy_lane.hpp"

#include <algorithm>
#include <utility>

#include "base/error.hpp"
#include "base/trace.hpp"

namespace spmoe {

CopyLane::CopyLane(Device& device, StreamPriority priority, OnNotice on_notice)
    : stream_{device.make_stream(priority)},
      on_notice_{std::move(on_notice)},
      worker_{[this] { work(); }} {}

CopyLane::~CopyLane() {
  {
    const std::scoped_lock lock{mutex_};
    stopping_ = true;
  }
  submitted_.notify_all();
  worker_.join();
}

void CopyLane::submit(std::span<const Fill> fills, std::span<const CopyBatch> batches) {
  if (fills.empty()) return;
  {
    const std::scoped_lock lock{mutex_};
    const double start_s = now_s();
    try {
      Fence fence = stream_->submit(batches);
      for (const Fill& fill : fills) pending_.push_back({fill, fence++, start_s});
    } catch (const DeviceError& rejection) {
      const BatchNotice failed{0, BatchNotice::What::failed, 0, rejection.what()};
      for (const Fill& fill : fills) rejected_.push({fill, failed, start_s, start_s});
    }
  }
  submitted_.notify_one();
}

const CopyLane::Pending* CopyLane::find(SlotIndex slot) const {
  const auto found =
      std::ranges::find(pending_, slot, [](const Pending& pending) { return pending.fill.slot; });
  return found == pending_.end() ? nullptr : &*found;
}

void CopyLane::withdraw(SlotIndex slot) {
  const std::scoped_lock lock{mutex_};
  if (const Pending* pending = find(slot)) stream_->withdraw(pending->fence);
}

void CopyLane::promote(SlotIndex slot) {
  const std::scoped_lock lock{mutex_};
  if (const Pending* pending = find(slot)) stream_->promote(pending->fence);
}

void CopyLane::make_consumer_wait(std::uintptr_t consumer, SlotIndex slot) {
  const std::scoped_lock lock{mutex_};
  if (const Pending* pending = find(slot)) stream_->make_consumer_wait(consumer, pending->fence);
}

void CopyLane::work() {
  double last_end_s = 0;
  std::unique_lock lock{mutex_};
  while (true) {
    submitted_.wait(lock, [this] { return stopping_ || !pending_.empty() || !rejected_.empty(); });
    if (!rejected_.empty()) {
      const FillNotice rejected = rejected_.pop();
      lock.unlock();
      on_notice_(rejected);
      lock.lock();
      continue;
    }
    if (pending_.empty()) return;
    lock.unlock();
    BatchNotice notice = stream_->next_notice();
    const double end_s = now_s();
    const bool ended = notice.what != BatchNotice::What::issued;
    lock.lock();
    const auto pending = std::ranges::find(pending_, notice.fence, &Pending::fence);
    const double start_s = std::max(pending->submitted_s, last_end_s);
    const Fill fill = pending->fill;
    if (ended) {
      *pending = pending_.back();
      pending_.pop_back();
    }
    lock.unlock();
    if (ended) last_end_s = end_s;
    on_notice_({fill, std::move(notice), start_s, end_s});
    lock.lock();
  }
}

}  // namespace spmoe
