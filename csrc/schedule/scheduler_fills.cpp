#include <algorithm>
#include <ranges>
#include <utility>

#include "schedule/scheduler.hpp"

// Which fill begins and in whose place; what changes about those under way; their ends.
namespace spmoe {
namespace {

constexpr std::size_t none = static_cast<std::size_t>(-1);

}  // namespace

std::optional<SlotIndex> Scheduler::find_victim(FillKind incoming) {
  // What was prefetched for the pass under way leaves last, and never for another prefetch; of it
  // first what is needed last, which can still be brought back in time.
  for (const bool spare_fresh : {true, false}) {
    candidates_.clear();
    for (SlotIndex slot = 0; slot < shape_.slot_count; ++slot) {
      const Slot& it = slots_[slot];
      if (it.state != SlotState::resident || it.leases > 0) continue;
      if (spare_fresh && fills_[slot].fresh) continue;
      candidates_.push_back({slot, it.expert});
    }
    if (!spare_fresh) keep_latest_needed();
    if (!candidates_.empty()) return eviction_->victim(candidates_, next_layer_);
    if (incoming == FillKind::prefetch) break;
  }
  return std::nullopt;
}

void Scheduler::keep_latest_needed() {
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
  return certain || prefetch_->admits({incoming.expert, slots_[victim].expert});
}

std::size_t Scheduler::find_startable(FillKind at_least) {
  bool looked = false;  // for a victim, which is the same for every prefetch until a slot changes
  std::optional<SlotIndex> victim;
  for (std::size_t i = 0; i < queue_.size();) {
    const TransferQueue::Entry entry = queue_[i];
    if (entry.kind < at_least) return none;
    const auto slot = slots_.find(entry.expert);
    // Until the end of a withdrawn fill is told, the expert can neither be read again nor be said
    // to be here. No prefetch passes a demand that waits for that.
    const bool ending = slot && fills_[*slot].withdrawn;
    if (slot && !ending) {
      // Here already, or on its way: it only has to stay until its layer has run.
      if (!std::exchange(fills_[*slot].fresh, true)) looked = false;
      queue_.erase(i);
      continue;
    }
    if (!ending) {
      if (slots_.find_empty()) return i;
      if (!std::exchange(looked, true)) victim = find_victim(entry.kind);
      if (victim && may_evict(entry, *victim)) {
        slots_.evict(*victim);
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
  const auto [expert, kind, order] = queue_[place];
  queue_.erase(place);
  const SlotIndex slot = slots_.find_empty().value();
  slots_.begin_fill(slot, expert);
  const bool prefetch = kind == FillKind::prefetch;
  fills_[slot] = {kind, prefetch, prefetch};
  return Fill{expert, slot, kind};
}

void Scheduler::withdraw_unless_kept(SlotIndex slot) {
  FillState& fill = fills_[slot];
  if (slots_[slot].state != SlotState::filling || fill.kind != FillKind::prefetch) return;
  const ExpertId expert = slots_[slot].expert;
  if (fill.issued || fill.withdrawn || waited_for(expert) || prefetch_->keeps(expert)) return;
  fill.withdrawn = true;
  change(slot, FillChange::To::withdrawn);
}

void Scheduler::change(SlotIndex slot, FillChange::To to) {
  std::erase_if(changes_, [=](const FillChange& other) { return other.slot == slot; });
  changes_.push_back({slot, to});
}

std::optional<FillChange> Scheduler::next_change() {
  if (changes_.empty()) return std::nullopt;
  const FillChange first = changes_.front();
  changes_.erase(changes_.begin());
  return first;
}

void Scheduler::count_moved(SlotIndex slot, std::uint64_t bytes) {
  LayerStats& stats = stats_[slots_[slot].expert.layer];
  (fills_[slot].kind == FillKind::demand ? stats.demand_bytes : stats.prefetch_bytes) += bytes;
  limits_.moved_bytes += bytes;
}

void Scheduler::forget_fill(SlotIndex slot) {
  fills_[slot].withdrawn = fills_[slot].issued = fills_[slot].computed_behind = false;
  std::erase_if(changes_, [=](const FillChange& change) { return change.slot == slot; });
}

void Scheduler::issued(SlotIndex slot) {
  const ExpertId expert = slots_[slot].expert;
  fills_[slot].issued = true;
  eviction_->on_fill(slot, expert);
  if (!fills_[slot].withdrawn && waited_for(expert)) become_ready(slot);
}

bool Scheduler::computed_ahead() const {
  return std::ranges::any_of(fills_, &FillState::computed_behind);
}

void Scheduler::filled(SlotIndex slot) {
  const ExpertId expert = slots_[slot].expert;
  slots_.finish_fill(slot);
  if (!fills_[slot].issued) eviction_->on_fill(slot, expert);
  count_moved(slot, shape_.blob_bytes);
  forget_fill(slot);
  queue_.cancel(expert, FillKind::demand);  // of one that was withdrawn and needed again
  if (waited_for(expert)) become_ready(slot);
}

void Scheduler::withdrawn(SlotIndex slot, std::uint64_t bytes_moved) {
  const ExpertId expert = slots_[slot].expert;
  count_moved(slot, bytes_moved);
  stats_[expert.layer].cancelled_bytes += shape_.blob_bytes - bytes_moved;
  forget_fill(slot);
  slots_.abort_fill(slot);
  if (waited_for(expert)) queue_.push(expert, FillKind::demand);
}

Spoiled Scheduler::failed(SlotIndex slot, std::uint64_t bytes_moved) {
  const ExpertId expert = slots_[slot].expert;
  const bool leased = slots_[slot].leases > 0;
  const Spoiled spoiled = leased                         ? Spoiled::need
                          : fills_[slot].computed_behind ? Spoiled::results
                                                         : Spoiled::nothing;
  count_moved(slot, bytes_moved);
  forget_fill(slot);
  fills_[slot].failed = leased;
  if (!leased) slots_.abort_fill(slot);
  if (!waited_for(expert)) return spoiled;
  if (fills_[slot].kind == FillKind::prefetch) {
    queue_.push(expert, FillKind::demand);  // only a read of its own can fail a need
    return Spoiled::nothing;
  }
  wants_[expert.expert] = Want::none;
  return Spoiled::need;
}

}  // namespace spmoe
