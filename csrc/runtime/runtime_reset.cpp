#include <algorithm>

#include "runtime/runtime.hpp"

// A runtime that was measured with becomes as new.
namespace spmoe {

void Runtime::reset() {
  require_own_process();                     // before any lock: a fork may have copied a held one
  const std::scoped_lock call{call_mutex_};  // no forward runs
  auto lock = lock_open();
  ++epoch_;  // predictions that the device has not made yet are of the past
  paused_ = true;
  for (SlotIndex slot = 0; slot < slot_count_; ++slot) {
    if (const auto ended = engine_->cancel(slot)) end_fill(*ended);
  }
  arrived_.wait(lock, [this] { return scheduler_.fills().in_flight() == 0; });
  paused_ = false;
  scheduler_ = Scheduler{scheduler_.foresight().shape, policies_};
  std::ranges::fill(timings_, LayerStats{});
  trace_.clear();
  access_failure_.clear();
  spoiled_.clear();
  iterations_ = accepted_ = dropped_predictions_ = 0;
  link_before_ = engine_->stats();
}

}  // namespace spmoe
