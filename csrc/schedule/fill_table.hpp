#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "base/stats.hpp"
#include "base/types.hpp"
#include "schedule/slot_table.hpp"
#include "schedule/transfer_queue.hpp"
#include "schedule/use_forecast.hpp"

namespace spmoe {

/// What is to change about the fill in flight into `slot`.
struct FillChange {
  enum class To : std::uint8_t {
    cancelled,  ///< nobody wants it any more: what has not begun need not be moved
    promoted    ///< a prefetch that compute waits for now: its rest is as urgent as a demand
  };
  SlotIndex slot;
  To to;
};

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
};

/// Every expert on its way or in a slot: fills that wait, fills in flight and slots that are
/// filled, with the counters of what was moved. One thread. After construction it allocates
/// nothing. A call that the state forbids is a bug of the caller and throws std::logic_error.
class FillTable {
 public:
  explicit FillTable(const SchedulerShape& shape);
  FillTable(const FillTable&) = delete;
  FillTable& operator=(const FillTable&) = delete;

  [[nodiscard]] const SlotTable& slots() const noexcept { return slots_; }
  [[nodiscard]] const FillRecord& operator[](SlotIndex slot) const { return fills_.at(slot); }

  /// The slot that holds the expert or is being filled with it, unless that fill is cancelled.
  [[nodiscard]] std::optional<SlotIndex> find(ExpertId expert) const;

  /// Whether a cancelled fill of the expert is still in flight.
  [[nodiscard]] bool ending(ExpertId expert) const;

  /// Fills that wait for a slot and the link.
  [[nodiscard]] TransferQueue& queue() noexcept { return queue_; }
  [[nodiscard]] const TransferQueue& queue() const noexcept { return queue_; }

  /// Starts a fill into an empty slot, of which there must be one.
  SlotIndex begin(ExpertId expert, FillKind kind);

  /// The fill may be computed behind. Returns false, and changes nothing, if it is cancelled.
  bool issue(SlotIndex slot);
  /// The expert of an issued fill is given out: it is computed behind the fill.
  void read(SlotIndex slot);
  /// Ends a fill that has landed whole: the expert is resident.
  void finish(SlotIndex slot);
  /// Ends a fill that moved `bytes_moved` bytes, not all: the slot is empty once it is not leased.
  void abort(SlotIndex slot, std::uint64_t bytes_moved);

  /// Nobody wants the fill any more. Only in the state `filling`.
  void cancel(SlotIndex slot);
  /// A prefetch in flight is as urgent as a demand now. Its kind stays.
  void promote(SlotIndex slot);
  /// A demand in flight that nobody waits for any more is as good as a prefetch.
  void demote(SlotIndex slot);
  /// The next change of a fill in flight, or none; each is told once, before its fill's end.
  [[nodiscard]] std::optional<FillChange> next_change();

  /// Leases the slot to compute for `layer` and counts the first use of a prefetch.
  void lease(SlotIndex slot);
  void release(SlotIndex slot);
  void evict(SlotIndex slot) { slots_.evict(slot); }

  /// Keeps the slot from prefetches until its layer has run, or no more. Returns what was before.
  bool keep_for_pass(SlotIndex slot, bool keep);

  [[nodiscard]] SlotIndex resident_count() const;

  /// Whether something was computed behind a fill that has not ended.
  [[nodiscard]] bool read_before_landed() const;

  [[nodiscard]] std::span<const LayerStats> stats() const noexcept { return stats_; }
  [[nodiscard]] LayerStats& stats(std::uint16_t layer) { return stats_.at(layer); }

 private:
  void count_moved(SlotIndex slot, std::uint64_t bytes);
  void change(SlotIndex slot, FillChange::To to);
  void forget_changes(SlotIndex slot);

  SlotTable slots_;
  std::uint64_t blob_bytes_;
  std::vector<FillRecord> fills_;  // by slot
  TransferQueue queue_;
  std::vector<FillChange> changes_;  // not told, at most one a slot
  std::vector<LayerStats> stats_;
};

}  // namespace spmoe
