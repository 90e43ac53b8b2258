#include <algorithm>

#include "runtime/runtime.hpp"

// The scheduler's fills in flight: started, changed and ended.
namespace spmoe {

void Runtime::start_fills() {
  if (paused_) return;
  while (const auto change = scheduler_.fills().next_change()) {
    if (change->to == FillChange::To::promoted) {
      engine_->promote(change->slot);
    } else if (const auto ended = engine_->cancel(change->slot)) {
      end_fill(*ended);
    }
  }
  const auto may_start = [this] {
    const bool room = scheduler_.fills().in_flight(FillKind::prefetch) < prefetch_window_;
    return room ? FillKind::prefetch : FillKind::demand;
  };
  copies_.clear();
  while (const auto fill = scheduler_.next_fill(may_start())) {
    const bool demand = fill->kind == FillKind::demand;
    copies_.push_back({fill->slot, demand ? CopyPriority::demand : CopyPriority::prefetch,
                       slot_data(fill->slot), blobs().extents(fill->expert),
                       last_use_[fill->slot]});
  }
  engine_->submit(copies_);
}

void Runtime::on_completion(const Completion& completion) {
  const std::scoped_lock lock{mutex_};
  if (completion.outcome == Completion::Outcome::issued) {
    scheduler_.progress(completion.slot, FillOutcome::issued);
    arrived_.notify_all();
    return;
  }
  end_fill(completion);
  start_fills();
}

void Runtime::end_fill(const Completion& completion) {
  using Outcome = Completion::Outcome;
  const SlotIndex slot = completion.slot;
  const ExpertId expert = scheduler_.fills().slots()[slot].expert;
  const bool demand = scheduler_.fills()[slot].kind == FillKind::demand;
  const FillOutcome outcome = completion.outcome == Outcome::arrived     ? FillOutcome::arrived
                              : completion.outcome == Outcome::cancelled ? FillOutcome::cancelled
                                                                         : FillOutcome::failed;
  if (const FailureScope spoiled = scheduler_.progress(slot, outcome, completion.bytes_moved);
      spoiled != FailureScope::nothing) {
    const std::string& loss = note_loss();
    (spoiled == FailureScope::access ? access_failure_ : spoiled_) =
        "could not fill " + store_->describe(expert) + ": " + completion.error + "; " +
        (loss.empty() ? "the request fails, the next one reads it again" : loss);
  }
  // A span begins where the one before it in its track ended, so that tracks show a busy link.
  double& last_end_s = last_end_s_[demand ? 1 : 0];
  const double start_s = std::max(to_seconds(completion.submitted), last_end_s);
  last_end_s = now_s();
  trace_.push({demand ? Track::demand : Track::prefetch, expert, start_s, last_end_s,
               static_cast<std::uint32_t>(scheduler_.fills().queue().size())});
  arrived_.notify_all();
}

}  // namespace spmoe
