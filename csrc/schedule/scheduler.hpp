#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/stats.hpp"
#include "base/types.hpp"
#include "schedule/eviction_policy.hpp"
#include "schedule/slot_table.hpp"
#include "schedule/transfer_queue.hpp"

namespace spmoe {

/// Sizes of the model and of the device's pool.
struct SchedulerShape {
  std::uint16_t layer_count;
  std::uint16_t expert_count;  ///< in each layer
  SlotIndex slot_count;
  std::uint64_t blob_bytes;
};

/// A fill to start now: copy the whole blob of `expert` into `slot`.
struct Fill {
  ExpertId expert;
  SlotIndex slot;
  FillKind kind;
};

/// An expert that may be computed now, leased until `computed` is called for it.
struct ReadyExpert {
  std::uint16_t expert;
  SlotIndex slot;
};

/// Decides which expert is filled into which slot, and when. A state machine: it owns no thread,
/// reads no clock and moves no byte, so that the worker, a unit test and a simulator can drive it.
/// One thread, or the caller's lock. After construction it allocates nothing.
///
/// One need at a time: `need` opens it, `take_ready` and `computed` consume it, and it ends when
/// every expert has been computed or by `abandon_need`. Meanwhile `next_fill` and `filled` or
/// `failed` move the transfers on.
class Scheduler {
 public:
  Scheduler(const SchedulerShape& shape, std::unique_ptr<EvictionPolicy> eviction);

  /// Router scores of a draft step for `layer`: [expert_count]. Counted.
  void predict(std::uint16_t layer, std::span<const float> scores);

  /// The target runs `experts` of `layer` now; distinct. Residents are leased at once, the others
  /// become demands, ahead of every prefetch. If all experts of a layer are needed at once (the
  /// prefill of a long prompt), those of the next layer are read ahead into spare slots.
  void need(std::uint16_t layer, std::span<const std::uint16_t> experts);

  /// Appends the experts of the running need that became ready since the last call, in the order
  /// in which they landed.
  void take_ready(std::vector<ReadyExpert>& ready);

  /// Compute has finished with an expert of the running need: its lease ends.
  void computed(std::uint16_t expert);

  /// Gives the running need up: ends its leases and withdraws its demands.
  void abandon_need();

  /// The next fill to start, with its slot assigned, or none: nothing waits, or every slot is
  /// leased or being filled. Demands come first.
  [[nodiscard]] std::optional<Fill> next_fill(FillKind at_least = FillKind::prefetch);

  void filled(SlotIndex slot);  ///< the fill of `slot` has landed
  /// The fill of `slot` failed; the slot is empty again. Returns whether the running need waited
  /// for it.
  bool failed(SlotIndex slot);

  /// The iteration is over: predictions that were not used lose their protection.
  void end_iteration();

  [[nodiscard]] std::span<const LayerStats> stats() const noexcept { return stats_; }
  [[nodiscard]] SlotIndex resident_count() const;

 private:
  enum class Want : std::uint8_t { none, waiting, leased };

  void become_ready(SlotIndex slot);
  void forget_predictions(std::uint16_t layer);
  [[nodiscard]] bool make_room(FillKind kind);
  void read_ahead(std::uint16_t layer);

  SchedulerShape shape_;
  SlotTable slots_;
  std::unique_ptr<EvictionPolicy> eviction_;
  TransferQueue queue_;

  struct FillState {
    FillKind kind = FillKind::demand;
    bool unused = false;  // prefetched and not used yet
    bool fresh = false;   // prefetched or kept for a layer that is still to come in this pass
  };
  std::vector<FillState> fills_;  // by slot

  std::uint16_t layer_ = 0;  // of the running or the last need
  std::vector<Want> wants_;  // by expert of `layer_`
  std::vector<ReadyExpert> landed_;
  std::vector<Candidate> candidates_;
  std::vector<LayerStats> stats_;
};

}  // namespace spmoe
