#include "schedule/fill_table.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace spmoe {
namespace {

void require(bool allowed, const char* call, SlotIndex slot) {
  if (allowed) return;
  throw std::logic_error{std::string{"FillTable::"} + call + ": forbidden in the state of slot " +
                         std::to_string(slot)};
}

}  // namespace

FillTable::FillTable(const SchedulerShape& shape)
    : slots_{shape.slot_count, shape.layer_count, shape.expert_count},
      blob_bytes_{shape.blob_bytes},
      fills_(shape.slot_count),
      queue_{std::size_t{shape.layer_count} * shape.expert_count},
      stats_(shape.layer_count) {
  changes_.reserve(shape.slot_count);
}

std::optional<SlotIndex> FillTable::find(ExpertId expert) const {
  const auto slot = slots_.find(expert);
  return slot && fills_[*slot].state == FillState::cancelled ? std::nullopt : slot;
}

bool FillTable::ending(ExpertId expert) const {
  const auto slot = slots_.find(expert);
  return slot && fills_[*slot].state == FillState::cancelled;
}

SlotIndex FillTable::begin(ExpertId expert, FillKind kind) {
  const SlotIndex slot = slots_.find_empty().value();
  slots_.begin_fill(slot, expert);
  const bool prefetch = kind == FillKind::prefetch;
  fills_[slot] = {kind, FillState::filling, /*used=*/!prefetch, /*kept_for_pass=*/prefetch};
  return slot;
}

bool FillTable::issue(SlotIndex slot) {
  FillState& state = fills_.at(slot).state;
  if (state == FillState::cancelled) return false;
  require(state == FillState::filling, "issue", slot);
  state = FillState::issued;
  return true;
}

void FillTable::read(SlotIndex slot) {
  FillState& state = fills_.at(slot).state;
  require(state == FillState::issued || state == FillState::read, "read", slot);
  state = FillState::read;
}

void FillTable::finish(SlotIndex slot) {
  slots_.finish_fill(slot);
  count_moved(slot, blob_bytes_);
  forget_changes(slot);
  fills_[slot].state = FillState::none;
}

void FillTable::abort(SlotIndex slot, std::uint64_t bytes_moved) {
  count_moved(slot, bytes_moved);
  forget_changes(slot);
  const bool leased = slots_[slot].leases > 0;
  fills_[slot].state = leased ? FillState::failed : FillState::none;
  if (!leased) slots_.abort_fill(slot);
}

void FillTable::cancel(SlotIndex slot) {
  require(fills_.at(slot).state == FillState::filling, "cancel", slot);
  fills_[slot].state = FillState::cancelled;
  change(slot, FillChange::To::cancelled);
}

void FillTable::promote(SlotIndex slot) { change(slot, FillChange::To::promoted); }

void FillTable::demote(SlotIndex slot) {
  require(fills_.at(slot).state == FillState::filling, "demote", slot);
  fills_[slot] = {FillKind::prefetch, FillState::filling, /*used=*/false, /*kept_for_pass=*/false};
}

void FillTable::change(SlotIndex slot, FillChange::To to) {
  forget_changes(slot);
  changes_.push_back({slot, to});
}

void FillTable::forget_changes(SlotIndex slot) {
  std::erase_if(changes_, [=](const FillChange& change) { return change.slot == slot; });
}

std::optional<FillChange> FillTable::next_change() {
  if (changes_.empty()) return std::nullopt;
  const FillChange first = changes_.front();
  changes_.erase(changes_.begin());
  return first;
}

void FillTable::lease(SlotIndex slot) {
  slots_.lease(slot);
  FillRecord& fill = fills_[slot];
  if (!fill.used) stats_[slots_[slot].expert.layer].prefetch_used_bytes += blob_bytes_;
  fill.used = true;
  fill.kept_for_pass = false;
}

void FillTable::release(SlotIndex slot) {
  slots_.release(slot);
  if (slots_[slot].leases > 0 || fills_[slot].state != FillState::failed) return;
  fills_[slot].state = FillState::none;
  slots_.abort_fill(slot);
}

bool FillTable::keep_for_pass(SlotIndex slot, bool keep) {
  return std::exchange(fills_.at(slot).kept_for_pass, keep);
}

SlotIndex FillTable::resident_count() const {
  return static_cast<SlotIndex>(
      std::ranges::count(slots_.slots(), SlotState::resident, &Slot::state));
}

bool FillTable::read_before_landed() const {
  return std::ranges::count(fills_, FillState::read, &FillRecord::state) > 0;
}

void FillTable::count_moved(SlotIndex slot, std::uint64_t bytes) {
  LayerStats& stats = stats_[slots_[slot].expert.layer];
  (fills_[slot].kind == FillKind::demand ? stats.demand_bytes : stats.prefetch_bytes) += bytes;
}

}  // namespace spmoe
