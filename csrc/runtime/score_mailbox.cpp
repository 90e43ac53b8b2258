#include "runtime/score_mailbox.hpp"

#include <utility>

#include "base/error.hpp"

namespace spmoe {

ScoreMailbox::ScoreMailbox(Device& device, std::size_t expert_count, std::size_t capacity,
                           OnScores on_scores)
    : device_{device},
      expert_count_{expert_count},
      capacity_{capacity},
      on_scores_{std::move(on_scores)},
      memory_{device, capacity * expert_count * sizeof(float)},
      worker_{[this] { work(); }} {}

ScoreMailbox::~ScoreMailbox() {
  {
    const std::scoped_lock lock{mutex_};
    stopping_ = true;
  }
  sent_.notify_all();
  worker_.join();
}

float* ScoreMailbox::scores(std::size_t place) const {
  return reinterpret_cast<float*>(memory_.data()) + place * expert_count_;
}

bool ScoreMailbox::send(const Letter& letter, const float* from, std::uintptr_t consumer) {
  const std::scoped_lock lock{mutex_};
  if (on_the_way_.size() == capacity_) return false;
  const std::size_t place = next_place_;
  const EventId arrived =
      device_.read_back(reinterpret_cast<std::byte*>(scores(place)), from,
                        expert_count_ * sizeof(float), consumer, HostWait::sleep);
  on_the_way_.push({letter, arrived, place});
  next_place_ = (place + 1) % capacity_;
  sent_.notify_one();
  return true;
}

void ScoreMailbox::work() {
  std::unique_lock lock{mutex_};
  while (true) {
    sent_.wait(lock, [this] { return stopping_ || !on_the_way_.empty(); });
    if (on_the_way_.empty()) return;
    const Sent oldest = on_the_way_.front();
    lock.unlock();
    bool here = true;
    try {
      device_.wait(oldest.arrived);
    } catch (const DeviceError&) {
      here = false;  // only advice is lost; whoever needs the failed work itself is told
    }
    if (here) on_scores_(oldest.letter, {scores(oldest.place), expert_count_});
    lock.lock();
    on_the_way_.pop();  // now, so that its place is not written while it is read
  }
}

}  // namespace spmoe
