#include "schedule/slot_table.hpp"

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace spmoe {
namespace {

constexpr SlotIndex no_slot = std::numeric_limits<SlotIndex>::max();

}  // namespace

SlotTable::SlotTable(SlotIndex slot_count, std::uint16_t layer_count, std::uint16_t expert_count)
    : slots_(slot_count),
      slot_of_(std::size_t{layer_count} * expert_count, no_slot),
      empty_(slot_count),
      expert_count_{expert_count} {
  std::iota(empty_.begin(), empty_.end(), SlotIndex{0});  // ascending is a valid min-heap
}

std::size_t SlotTable::place(ExpertId expert) const {
  if (expert.expert >= expert_count_) {
    throw std::out_of_range{"SlotTable: no expert " + std::to_string(expert.expert)};
  }
  return std::size_t{expert.layer} * expert_count_ + expert.expert;
}

Slot& SlotTable::require(SlotIndex slot, bool allowed, const char* call) {
  if (!allowed) {
    throw std::logic_error{std::string{"SlotTable::"} + call + ": forbidden in the state of slot " +
                           std::to_string(slot)};
  }
  return slots_[slot];
}

std::optional<SlotIndex> SlotTable::find(ExpertId expert) const {
  const SlotIndex slot = slot_of_.at(place(expert));
  return slot == no_slot ? std::nullopt : std::optional{slot};
}

std::optional<SlotIndex> SlotTable::find_empty() const {
  return empty_.empty() ? std::nullopt : std::optional{empty_.front()};
}

void SlotTable::begin_fill(SlotIndex slot, ExpertId expert) {
  Slot& filled = require(
      slot, !empty_.empty() && empty_.front() == slot && slot_of_.at(place(expert)) == no_slot,
      "begin_fill");
  std::ranges::pop_heap(empty_, std::greater{});
  empty_.pop_back();
  filled = {.state = SlotState::filling, .expert = expert};
  slot_of_[place(expert)] = slot;
}

void SlotTable::finish_fill(SlotIndex slot) {
  require(slot, slots_.at(slot).state == SlotState::filling, "finish_fill").state =
      SlotState::resident;
}

void SlotTable::abort_fill(SlotIndex slot) { make_empty(slot, SlotState::filling, "abort_fill"); }

void SlotTable::evict(SlotIndex slot) { make_empty(slot, SlotState::resident, "evict"); }

void SlotTable::make_empty(SlotIndex slot, SlotState from, const char* call) {
  Slot& left = require(slot, slots_.at(slot).state == from && slots_[slot].leases == 0, call);
  slot_of_[place(left.expert)] = no_slot;
  left.state = SlotState::empty;
  empty_.push_back(slot);
  std::ranges::push_heap(empty_, std::greater{});
}

void SlotTable::lease(SlotIndex slot) {
  ++require(slot, slots_.at(slot).state != SlotState::empty, "lease").leases;
}

void SlotTable::release(SlotIndex slot) {
  --require(slot, slots_.at(slot).leases > 0, "release").leases;
}

}  // namespace spmoe
