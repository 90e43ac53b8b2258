#pragma once

#include <array>
#include <cstddef>
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

/// A change of the fill in flight into `slot`.
struct FillChange {
  enum class To : std::uint8_t {
    cancelled,  ///< nobody wants it any more: what has not begun need not be moved
    promoted    ///< a prefetch that compute waits for now: its rest is as urgent as a demand
  };
  SlotIndex slot;
  To to;
};

/// Every fill and every expert in a slot, with the counters of what was moved. A fill waits in
/// `queue`; from `begin` on its state is in its slot. One thread. After construction it allocates
/// nothing. A call that the state forbids is a bug of the caller and throws std::logic_error.
class FillTable {
 public:
  explicit FillTable(const SchedulerShape& shape);
  FillTable(const FillTable&) = delete;
  FillTable& operator=(const FillTable&) = delete;

  [[nodiscard]] const SlotTable& slots() const noexcept { return slots_; }
  [[nodiscard]] const FillRecord& operator[](SlotIndex slot) const { return slots_[slot].fill; }

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
  /// Ends a fill that has arrived whole: the expert is resident.
  void finish(SlotIndex slot);
  /// Ends a fill that moved `bytes_moved` bytes, not all: the slot is empty once it is not leased.
  void abort(SlotIndex slot, std::uint64_t bytes_moved);

  /// Nobody wants the fill any more. Only in the state `filling`.
  void cancel(SlotIndex slot);
  /// A prefetch in flight is as urgent as a demand now. Its kind stays.
  void promote(SlotIndex slot);
  /// A demand in flight that nobody waits for any more is as good as a prefetch.
  void demote(SlotIndex slot);
  /// The earliest change of a fill in flight that was not taken yet, or none. The end of a fill
  /// drops its change.
  [[nodiscard]] std::optional<FillChange> next_change();

  /// Leases the slot to compute for `layer` and counts the first use of a prefetch.
  void lease(SlotIndex slot);
  void release(SlotIndex slot);
  void evict(SlotIndex slot) { slots_.evict(slot); }

  /// Keeps the slot from prefetches until its layer has run, or no more. Returns what was before.
  bool keep_for_pass(SlotIndex slot, bool keep);

  /// Fills in flight, of a kind or in all.
  [[nodiscard]] std::size_t in_flight(FillKind kind) const noexcept {
    return in_flight_[static_cast<std::size_t>(kind)];
  }
  [[nodiscard]] std::size_t in_flight() const noexcept {
    return in_flight(FillKind::prefetch) + in_flight(FillKind::demand);
  }
  [[nodiscard]] SlotIndex resident_count() const;

  /// Whether something was computed behind a fill that has not ended.
  [[nodiscard]] bool read_before_arrival() const;

  [[nodiscard]] std::span<const LayerStats> stats() const noexcept { return stats_; }
  [[nodiscard]] LayerStats& stats(std::uint16_t layer) { return stats_.at(layer); }

 private:
  void end(SlotIndex slot, FillState state, std::uint64_t bytes_moved);
  void note_change(FillRecord& fill);
  void drop_change(FillRecord& fill);
  [[nodiscard]] std::size_t& in_flight_of(FillKind kind) {
    return in_flight_[static_cast<std::size_t>(kind)];
  }

  SlotTable slots_;
  std::uint64_t blob_bytes_;
  TransferQueue queue_;
  std::array<std::size_t, 2> in_flight_{};  // fills, by kind
  std::uint64_t last_change_ = 0;           // its place in the order
  std::size_t changes_ = 0;                 // not taken yet
  std::vector<LayerStats> stats_;
};

}  // namespace spmoe
