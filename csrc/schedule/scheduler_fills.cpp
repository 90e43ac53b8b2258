#include <algorithm>
#include <ranges>
#include <utility>

#include "schedule/scheduler.hpp"

// Which fill begins and in whose place; which in flight are cancelled; their ends.
namespace spmoe {
namespace {

constexpr std::size_t none = static_cast<std::size_t>(-1);

}  // namespace

std::optional<SlotIndex> Scheduler::find_victim(FillKind incoming) {
  // Prefetches for the current pass are evicted last, and never to make room for another prefetch.
  // Among them, the one whose layer runs latest goes first: it can still be fetched again in time.
  for (const bool spare_kept : {true, false}) {
    candidates_.clear();
    for (SlotIndex slot = 0; slot < shape_.slot_count; ++slot) {
      const Slot& it = fills_->slots()[slot];
      if (it.state != SlotState::resident || it.leases > 0) continue;
      if (spare_kept && (*fills_)[slot].kept_for_pass) continue;
      candidates_.push_back({slot, it.expert});
    }
    if (!spare_kept) keep_latest_used();
    if (!candidates_.empty()) return eviction_->victim(candidates_, next_layer_);
    if (incoming == FillKind::prefetch) break;
  }
  return std::nullopt;
}

void Scheduler::keep_latest_used() {
  const auto layers_until_use = [this](const Candidate& c) {
    return (c.resident.layer + shape_.layer_count - next_layer_) % shape_.layer_count;
  };
  if (candidates_.empty()) return;
  const int latest = std::ranges::max(candidates_ | std::views::transform(layers_until_use));
  std::erase_if(candidates_, [&](const Candidate& c) { return layers_until_use(c) < latest; });
}

bool Scheduler::may_evict(const TransferQueue::Entry& incoming, SlotIndex victim) const {
  if (incoming.kind == FillKind::demand) return true;
  const bool certain = incoming.expert.layer == ahead_layer_;  // not a prediction
  return certain || prefetch_->admits({incoming.expert, fills_->slots()[victim].expert});
}

std::size_t Scheduler::find_startable(FillKind at_least) {
  bool looked = false;  // for a victim, which is the same for every prefetch until a slot changes
  std::optional<SlotIndex> victim;
  TransferQueue& queue = fills_->queue();
  for (std::size_t i = 0; i < queue.size();) {
    const TransferQueue::Entry entry = queue[i];
    if (entry.kind < at_least) return none;
    if (const auto slot = fills_->find(entry.expert)) {
      // Here already, or in flight: it only has to stay until its layer has run.
      if (!fills_->keep_for_pass(*slot, true)) looked = false;
      queue.erase(i);
      continue;
    }
    // Until the end of a cancelled fill is reported, the expert can neither be read again nor be
    // said to be here. No prefetch passes a demand that waits for that.
    if (!fills_->ending(entry.expert)) {
      if (fills_->slots().find_empty()) return i;
      if (!std::exchange(looked, true)) victim = find_victim(entry.kind);
      if (victim && may_evict(entry, *victim)) {
        fills_->evict(*victim);
        return i;
      }
      if (entry.kind == FillKind::demand) return none;
    }
    if (entry.kind == FillKind::demand) at_least = FillKind::demand;
    ++i;
  }
  return none;
}

std::optional<Fill> Scheduler::next_fill(FillKind at_least) {
  const std::size_t place = find_startable(at_least);
  if (place == none) return std::nullopt;
  const auto [expert, kind, order] = fills_->queue()[place];
  fills_->queue().erase(place);
  return Fill{expert, fills_->begin(expert, kind), kind};
}

void Scheduler::cancel_unless_kept(SlotIndex slot) {
  const FillRecord& fill = (*fills_)[slot];
  if (fill.state != FillState::filling || fill.kind != FillKind::prefetch) return;
  const ExpertId expert = fills_->slots()[slot].expert;
  if (!waited_for(expert) && !prefetch_->keeps(expert)) fills_->cancel(slot);
}

FailureScope Scheduler::progress(SlotIndex slot, FillOutcome outcome, std::uint64_t bytes_moved) {
  const ExpertId expert = fills_->slots()[slot].expert;
  if (outcome == FillOutcome::issued) {
    if (!fills_->issue(slot)) return FailureScope::nothing;
    eviction_->on_fill(slot, expert);
    if (waited_for(expert)) become_ready(slot);
    return FailureScope::nothing;
  }
  const bool whole = outcome == FillOutcome::arrived;
  foresight_->limits.moved_bytes += whole ? shape_.blob_bytes : bytes_moved;
  if (whole) {
    finish_fill(slot);
  } else if (outcome == FillOutcome::failed) {
    return fail_fill(slot, bytes_moved);
  } else {
    fills_->stats(expert.layer).cancelled_bytes += shape_.blob_bytes - bytes_moved;
    fills_->abort(slot, bytes_moved);
    if (waited_for(expert)) fills_->queue().push(expert, FillKind::demand);
  }
  return FailureScope::nothing;
}

void Scheduler::finish_fill(SlotIndex slot) {
  const ExpertId expert = fills_->slots()[slot].expert;
  const FillState state = (*fills_)[slot].state;
  const bool announced = state == FillState::issued || state == FillState::read;
  fills_->finish(slot);
  if (!announced) eviction_->on_fill(slot, expert);
  fills_->queue().cancel(expert, FillKind::demand);  // of one that was cancelled and needed again
  if (waited_for(expert)) become_ready(slot);
}

FailureScope Scheduler::fail_fill(SlotIndex slot, std::uint64_t bytes_moved) {
  const ExpertId expert = fills_->slots()[slot].expert;
  const FillRecord fill = (*fills_)[slot];
  const bool leased = fills_->slots()[slot].leases > 0;
  const FailureScope spoiled = leased                          ? FailureScope::access
                               : fill.state == FillState::read ? FailureScope::results
                                                               : FailureScope::nothing;
  fills_->abort(slot, bytes_moved);
  if (!waited_for(expert)) return spoiled;
  if (fill.kind == FillKind::prefetch) {
    fills_->queue().push(expert, FillKind::demand);  // only a read of its own can fail an access
    return FailureScope::nothing;
  }
  wants_[expert.expert] = Want::none;
  return FailureScope::access;
}

}  // namespace spmoe
