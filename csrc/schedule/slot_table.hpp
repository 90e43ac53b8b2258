#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "base/types.hpp"
#include "schedule/transfer_queue.hpp"

namespace spmoe {

/// empty -> filling -> resident -> empty. A failed fill goes back to empty. A slot that is not
/// empty may be leased any number of times at once and then becomes no other's: while it is being
/// filled, by who computes behind the fill.
enum class SlotState : std::uint8_t { empty, filling, resident };

/// Where the latest fill of a slot stands.
///
///     none -> filling -> issued -> read
///                 |         |        |    an end: none, or failed while the slot is leased
///                 +-> cancelled      v
enum class FillState : std::uint8_t {
  none,       ///< ended; the slot is empty or resident
  filling,    ///< started
  issued,     ///< may be computed behind
  read,       ///< issued, and its expert was given out to be computed
  cancelled,  ///< nobody wants it; it has its slot until it ends, whole or not
  failed      ///< ended without its expert, in a slot that is still leased
};

/// The latest fill of a slot.
struct FillRecord {
  FillKind kind = FillKind::demand;
  FillState state = FillState::none;
  bool used = true;            ///< false: a prefetch whose expert was not used yet
  bool kept_for_pass = false;  ///< until its layer has run no prefetch takes its slot
  std::uint64_t change = 0;    ///< place in the order of changes not taken yet; 0: none
};

struct Slot {
  SlotState state = SlotState::empty;
  ExpertId expert{};         ///< meaningful unless empty
  std::uint32_t leases = 0;  ///< uses that have not ended
  FillRecord fill{};         ///< `FillTable` keeps it
};

/// Residency: which expert is in which slot, in which state, leased how often. One thread.
/// A call that the state forbids is a bug of the caller and throws std::logic_error.
class SlotTable {
 public:
  SlotTable(SlotIndex slot_count, std::uint16_t layer_count, std::uint16_t expert_count);

  [[nodiscard]] std::span<const Slot> slots() const noexcept { return slots_; }
  [[nodiscard]] const Slot& operator[](SlotIndex slot) const { return slots_.at(slot); }
  [[nodiscard]] FillRecord& fill(SlotIndex slot) { return slots_.at(slot).fill; }

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
  void make_empty(SlotIndex slot, SlotState from, const char* call);
  Slot& require(SlotIndex slot, bool allowed, const char* call);

  std::vector<Slot> slots_;
  std::vector<SlotIndex> slot_of_;  // [layer, expert], or no_slot
  std::vector<SlotIndex> empty_;    // a heap, lowest first
  std::uint16_t expert_count_;
};

}  // namespace spmoe
