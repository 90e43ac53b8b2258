#include "runtime/score_readback.hpp"

#include <utility>

#include "base/error.hpp"

namespace spmoe {

ScoreReadback::ScoreReadback(Device& device, std::size_t expert_count, std::size_t capacity,
                             OnScores on_scores)
    : device_{device},
      expert_count_{expert_count},
      capacity_{capacity},
      on_scores_{std::move(on_scores)},
      memory_{device, capacity * expert_count * sizeof(float)},
      worker_{[this] { work(); }} {}

ScoreReadback::~ScoreReadback() {
  {
    const std::scoped_lock lock{mutex_};
    stopping_ = true;
  }
  sent_.notify_all();
  worker_.join();
}

float* ScoreReadback::scores(std::size_t place) const {
  return reinterpret_cast<float*>(memory_.data()) + place * expert_count_;
}

bool ScoreReadback::send(const Origin& origin, const float* from, std::uintptr_t consumer) {
  const std::scoped_lock lock{mutex_};
  if (in_flight_.size() == capacity_) return false;
  const std::size_t place = next_place_;
  const EventId arrived =
      device_.read_back(reinterpret_cast<std::byte*>(scores(place)), from,
                        expert_count_ * sizeof(float), consumer, HostWait::sleep);
  in_flight_.push({origin, arrived, place});
  next_place_ = (place + 1) % capacity_;
  sent_.notify_one();
  return true;
}

void ScoreReadback::work() {
  std::unique_lock lock{mutex_};
  while (true) {
    sent_.wait(lock, [this] { return stopping_ || !in_flight_.empty(); });
    if (in_flight_.empty()) return;
    const Sent oldest = in_flight_.front();
    lock.unlock();
    bool here = true;
    try {
      device_.wait(oldest.arrived);
    } catch (const DeviceError&) {
      here =
          false;  // a lost prediction costs time; the failed work itself is reported to its caller
    }
    if (here) on_scores_(oldest.origin, {scores(oldest.place), expert_count_});
    lock.lock();
    in_flight_.pop();  // now, so that its place is not written while it is read
  }
}

}  // namespace spmoe
