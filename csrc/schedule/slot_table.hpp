#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "base/types.hpp"

namespace spmoe {

/// empty -> filling -> resident -> empty. A failed fill goes back to empty. A slot that is not
/// empty may be leased any number of times at once and then becomes no other's: while it is being
/// filled, by who computes behind the fill.
enum class SlotState : std::uint8_t { empty, filling, resident };

struct Slot {
  SlotState state = SlotState::empty;
  ExpertId expert{};         ///< meaningful unless empty
  std::uint32_t leases = 0;  ///< uses under way
};

/// Residency: which expert is in which slot, in which state, leased how often. One thread.
/// A call that the state forbids is a bug of the caller and throws std::logic_error.
class SlotTable {
 public:
  SlotTable(SlotIndex slot_count, std::uint16_t layer_count, std::uint16_t expert_count);

  [[nodiscard]] std::span<const Slot> slots() const noexcept { return slots_; }
  [[nodiscard]] const Slot& operator[](SlotIndex slot) const { return slots_.at(slot); }

  /// The slot that holds or is being filled with `expert`.
  [[nodiscard]] std::optional<SlotIndex> find(ExpertId expert) const;

  /// An empty slot, the lowest.
  [[nodiscard]] std::optional<SlotIndex> find_empty() const;

  /// empty -> filling. `slot` is the one that `find_empty` returns; `expert` has none yet.
  void begin_fill(SlotIndex slot, ExpertId expert);
  void finish_fill(SlotIndex slot);  ///< filling -> resident
  void abort_fill(SlotIndex slot);   ///< filling and not leased -> empty
  void evict(SlotIndex slot);        ///< resident and not leased -> empty
  void lease(SlotIndex slot);        ///< not empty, one lease more
  void release(SlotIndex slot);      ///< one lease less

 private:
  [[nodiscard]] std::size_t place(ExpertId expert) const;
  Slot& require(SlotIndex slot, bool allowed, const char* call);

  std::vector<Slot> slots_;
  std::vector<SlotIndex> slot_of_;  // [layer, expert], or no_slot
  std::vector<SlotIndex> empty_;    // a heap, lowest first
  std::uint16_t expert_count_;
};

}  // namespace spmoe
