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
      queue_{std::size_t{shape.layer_count} * shape.expert_count},
      stats_(shape.layer_count) {}

std::optional<SlotIndex> FillTable::find(ExpertId expert) const {
  const auto slot = slots_.find(expert);
  return slot && slots_[*slot].fill.state == FillState::cancelled ? std::nullopt : slot;
}

bool FillTable::ending(ExpertId expert) const {
  const auto slot = slots_.find(expert);
  return slot && slots_[*slot].fill.state == FillState::cancelled;
}

SlotIndex FillTable::begin(ExpertId expert, FillKind kind) {
  const SlotIndex slot = slots_.find_empty().value();
  slots_.begin_fill(slot, expert);
  const bool prefetch = kind == FillKind::prefetch;
  slots_.fill(slot) = {kind, FillState::filling, /*used=*/!prefetch, /*kept_for_pass=*/prefetch};
  ++in_flight_of(kind);
  return slot;
}

bool FillTable::issue(SlotIndex slot) {
  FillState& state = slots_.fill(slot).state;
  if (state == FillState::cancelled) return false;
  require(state == FillState::filling, "issue", slot);
  state = FillState::issued;
  return true;
}

void FillTable::read(SlotIndex slot) {
  FillState& state = slots_.fill(slot).state;
  require(state == FillState::issued || state == FillState::read, "read", slot);
  state = FillState::read;
}

void FillTable::finish(SlotIndex slot) {
  end(slot, FillState::none, blob_bytes_);
  slots_.finish_fill(slot);
}

void FillTable::abort(SlotIndex slot, std::uint64_t bytes_moved) {
  const bool leased = slots_[slot].leases > 0;
  end(slot, leased ? FillState::failed : FillState::none, bytes_moved);
  if (!leased) slots_.abort_fill(slot);
}

void FillTable::end(SlotIndex slot, FillState state, std::uint64_t bytes_moved) {
  FillRecord& fill = slots_.fill(slot);
  require(fill.state != FillState::none && fill.state != FillState::failed, "end", slot);
  LayerStats& stats = stats_[slots_[slot].expert.layer];
  (fill.kind == FillKind::demand ? stats.demand_bytes : stats.prefetch_bytes) += bytes_moved;
  --in_flight_of(fill.kind);
  drop_change(fill);
  fill.state = state;
}

void FillTable::cancel(SlotIndex slot) {
  FillRecord& fill = slots_.fill(slot);
  require(fill.state == FillState::filling, "cancel", slot);
  fill.state = FillState::cancelled;
  note_change(fill);
}

void FillTable::promote(SlotIndex slot) { note_change(slots_.fill(slot)); }

void FillTable::demote(SlotIndex slot) {
  FillRecord& fill = slots_.fill(slot);
  require(fill.state == FillState::filling, "demote", slot);
  --in_flight_of(fill.kind);
  ++in_flight_of(FillKind::prefetch);
  fill.kind = FillKind::prefetch;
  fill.used = fill.kept_for_pass = false;
}

void FillTable::note_change(FillRecord& fill) {
  if (fill.change == 0) ++changes_;
  fill.change = ++last_change_;
}

void FillTable::drop_change(FillRecord& fill) {
  if (std::exchange(fill.change, 0) != 0) --changes_;
}

std::optional<FillChange> FillTable::next_change() {
  if (changes_ == 0) return std::nullopt;
  // One that was not noted is last: 0 - 1 wraps round.
  const auto place = [](const Slot& slot) { return slot.fill.change - 1; };
  const auto first = std::ranges::min_element(slots_.slots(), {}, place);
  const auto slot = static_cast<SlotIndex>(first - slots_.slots().begin());
  FillRecord& fill = slots_.fill(slot);
  drop_change(fill);
  return FillChange{slot, fill.state == FillState::cancelled ? FillChange::To::cancelled
                                                             : FillChange::To::promoted};
}

void FillTable::lease(SlotIndex slot) {
  slots_.lease(slot);
  FillRecord& fill = slots_.fill(slot);
  if (!fill.used) stats_[slots_[slot].expert.layer].prefetch_used_bytes += blob_bytes_;
  fill.used = true;
  fill.kept_for_pass = false;
}

void FillTable::release(SlotIndex slot) {
  slots_.release(slot);
  FillState& state = slots_.fill(slot).state;
  if (slots_[slot].leases > 0 || state != FillState::failed) return;
  state = FillState::none;
  slots_.abort_fill(slot);
}

bool FillTable::keep_for_pass(SlotIndex slot, bool keep) {
  return std::exchange(slots_.fill(slot).kept_for_pass, keep);
}

SlotIndex FillTable::resident_count() const {
  return static_cast<SlotIndex>(
      std::ranges::count(slots_.slots(), SlotState::resident, &Slot::state));
}

bool FillTable::read_before_arrival() const {
  const auto read = [](const Slot& slot) { return slot.fill.state == FillState::read; };
  return std::ranges::any_of(slots_.slots(), read);
}

}  // namespace spmoe
