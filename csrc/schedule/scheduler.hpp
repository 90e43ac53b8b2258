#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "base/stats.hpp"
#include "base/types.hpp"
#include "schedule/activation_history.hpp"
#include "schedule/policies.hpp"
#include "schedule/routing_trace.hpp"
#include "schedule/slot_table.hpp"
#include "schedule/transfer_queue.hpp"
#include "schedule/use_forecast.hpp"

namespace spmoe {

/// A fill to start now: copy the whole blob of `expert` into `slot`.
struct Fill {
  ExpertId expert;
  SlotIndex slot;
  FillKind kind;
};

/// Whose results a failed fill spoils.
enum class Spoiled : std::uint8_t {
  nothing,
  need,    ///< those of the running need, which cannot end
  results  ///< of a need that has ended, or an expert of the running one that was computed
};

/// What is to change about the fill under way into `slot`.
struct FillChange {
  enum class To : std::uint8_t {
    withdrawn,  ///< nobody wants it any more: what has not begun need not be moved
    promoted    ///< a prefetch that compute waits for now: its rest is as urgent as a demand
  };
  SlotIndex slot;
  To to;
};

/// An expert that may be computed now, leased until `computed` is called for it.
struct ReadyExpert {
  std::uint16_t expert;
  SlotIndex slot;
  bool landing = false;  ///< only behind its fill, which is issued and has not ended
};

/// Decides which expert is filled into which slot, and when. A state machine: it owns no thread,
/// reads no clock and moves no byte, so that the worker, a unit test and a simulator can drive it.
/// One thread, or the caller's lock. After construction it allocates nothing, `replay` and
/// recording apart.
///
/// One need at a time: `need` opens it, `take_ready` and `computed` consume it, and it ends when
/// every expert has been computed or by `abandon_need`. Meanwhile `next_change`, `next_fill` and
/// `filled`, `withdrawn` or `failed` move the transfers on. Where compute can be ordered behind a
/// fill, `issued` makes its expert ready before it has landed.
///
/// A prefetch under way is withdrawn when its layer runs without its expert, or when the iteration
/// that predicted it ends and its layer has not run, unless the policy keeps it. After a
/// verification every layer has run, so the second concerns drafts that were never verified. A
/// withdrawn fill still has its slot until its end is told: one that is needed meanwhile is a miss,
/// demanded anew, and read again unless the first turns out to have landed whole.
class Scheduler {
 public:
  /// @throws InvalidArgument if a policy of that name does not exist.
  explicit Scheduler(const SchedulerShape& shape, const PolicyNames& names = {});
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  /// A request begins: what earlier ones did becomes the past; see `ActivationHistory`. If the one
  /// before ended early, in the middle of an iteration, that iteration ends here.
  void begin_request();

  /// What the router of `layer` is expected to choose for one or more tokens: [expert_count], as
  /// `UseForecast::predict` takes them. Scores for a layer that has run already are ignored.
  void predict(std::uint16_t layer, std::span<const float> scores,
               PredictionSource source = PredictionSource::draft);

  /// Replaces the prefetches that wait by `experts`, in that order, those of the next layer of a
  /// prompt apart. They end as predictions do: when their layer runs, or the iteration ends.
  void plan(std::span<const ExpertId> experts);

  /// The target runs `experts` of `layer` now; distinct. Residents are leased at once, the others
  /// become demands, ahead of every prefetch. In a pass of a prompt (more than 32 tokens, or all
  /// experts of the layer), those of the next layer are read ahead into spare slots.
  /// @param rows of each expert, `tokens` in all; empty: one each.
  void need(std::uint16_t layer, std::span<const std::uint16_t> experts,
            std::span<const std::uint32_t> rows = {}, std::uint32_t tokens = 1);

  /// Appends the experts of the running need that became ready since the last call, in the order
  /// in which they landed.
  void take_ready(std::vector<ReadyExpert>& ready);

  /// Compute has finished with an expert of the running need: its lease ends.
  void computed(std::uint16_t expert);

  /// Gives the running need up: ends its leases and withdraws its demands.
  void abandon_need();

  /// The next change to a fill under way, or none; each is told once. To be asked before
  /// `next_fill`. A driver that never asks lets such fills land.
  [[nodiscard]] std::optional<FillChange> next_change();

  /// The next fill to start, with its slot assigned, or none: nothing waits, or every slot is
  /// leased, being filled or worth more than what waits. Demands come first.
  [[nodiscard]] std::optional<Fill> next_fill(FillKind at_least = FillKind::prefetch);

  /// The fill of `slot` is on its way, and may be computed behind. Told at most once, before its
  /// end, and not of one that ends as withdrawn.
  void issued(SlotIndex slot);
  /// The fill of `slot` has landed whole, even if it was to be withdrawn.
  void filled(SlotIndex slot);
  /// The fill of `slot` was withdrawn with `bytes_moved` of its bytes; the slot is empty again.
  void withdrawn(SlotIndex slot, std::uint64_t bytes_moved);
  /// The fill of `slot` failed with `bytes_moved` of its bytes; the slot is empty again, once it is
  /// not leased. A prefetch that is needed becomes a demand, and spoils nothing.
  Spoiled failed(SlotIndex slot, std::uint64_t bytes_moved);

  /// Whether something was computed behind a fill that has not ended.
  [[nodiscard]] bool computed_ahead() const;

  /// The iteration is over: predictions that were not used lose their protection, and prefetches
  /// for layers that did not run are withdrawn.
  void end_iteration();

  /// As new: nothing is resident, nothing learnt, recorded or known ahead, and all counters are 0.
  /// No fill may be in flight, and no need open.
  void reset();

  /// What the measured costs of the machine allow; see `PrefetchLimits`.
  [[nodiscard]] PrefetchLimits& limits() noexcept { return limits_; }

  /// The routing that policies which replay one know ahead of time. Starts at its beginning.
  /// @throws InvalidArgument if it is of a model of another shape.
  void replay(RoutingTrace trace);

  /// From now on every need is recorded, or none is. Starting forgets the record before.
  void record(bool on);
  [[nodiscard]] const RoutingTrace& recorded() const noexcept { return recorded_; }

  [[nodiscard]] std::span<const LayerStats> stats() const noexcept { return stats_; }
  [[nodiscard]] const UseForecast& forecast() const noexcept { return forecast_; }
  [[nodiscard]] const SlotTable& slots() const noexcept { return slots_; }
  [[nodiscard]] SlotIndex resident_count() const;
  [[nodiscard]] std::size_t queue_depth() const noexcept { return queue_.size(); }
  [[nodiscard]] std::string_view prefetch_name() const noexcept { return prefetch_row_.name; }
  [[nodiscard]] std::string_view eviction_name() const noexcept { return eviction_row_.name; }

 private:
  enum class Want : std::uint8_t { none, waiting, leased };

  [[nodiscard]] bool waited_for(ExpertId expert) const;  // by the running need
  void become_ready(SlotIndex slot);
  void release(SlotIndex slot);
  void count_repeated(std::uint16_t layer, std::span<const std::uint16_t> experts);
  void count_recall(std::uint16_t layer, std::span<const std::uint16_t> experts);
  void forget_predictions(std::uint16_t layer);
  void withdraw_unwanted(std::uint16_t layer);
  void withdraw_unless_kept(SlotIndex slot);
  void change(SlotIndex slot, FillChange::To to);
  void count_moved(SlotIndex slot, std::uint64_t bytes);
  void forget_fill(SlotIndex slot);
  void read_ahead(std::uint16_t layer);
  [[nodiscard]] std::optional<SlotIndex> find_victim(FillKind incoming);
  void keep_latest_needed();  // of the candidates
  [[nodiscard]] bool may_evict(const TransferQueue::Entry& incoming, SlotIndex victim) const;
  [[nodiscard]] std::size_t find_startable(FillKind at_least);

  SchedulerShape shape_;
  const PrefetchEntry& prefetch_row_;
  const EvictionEntry& eviction_row_;
  SlotTable slots_;
  UseForecast forecast_;
  ActivationHistory history_;
  RoutingTrace trace_;
  RoutingTrace recorded_;
  bool recording_ = false;
  bool iterating_ = false;  // something was predicted or needed since the last iteration's end
  PrefetchLimits limits_;
  std::unique_ptr<EvictionPolicy> eviction_;
  std::unique_ptr<PrefetchPolicy> prefetch_;
  TransferQueue queue_;

  struct FillState {
    FillKind kind = FillKind::demand;
    bool unused = false;  // prefetched and not used yet
    bool fresh = false;   // prefetched or kept for a layer that is still to come in this pass
    bool withdrawn = false;
    bool issued = false;
    bool computed_behind = false;
    bool failed = false;  // and leased
  };
  std::vector<FillState> fills_;     // by slot
  std::vector<FillChange> changes_;  // not told, at most one a slot

  std::uint16_t layer_ = 0;       // of the running or the last need
  std::uint16_t next_layer_ = 0;  // that will be needed next: what `layer_` needs is leased
  static constexpr std::uint16_t no_layer = 0xFFFF;
  std::uint16_t ahead_layer_ = no_layer;  // of the prompt under way, being read ahead
  std::vector<Want> wants_;               // by expert of `layer_`
  std::vector<ReadyExpert> landed_;
  std::vector<Candidate> candidates_;
  std::vector<std::uint8_t> critical_;  // [layer, expert]: 1 among top-k of a prediction, 2 top-2k
  std::vector<std::uint8_t> needed_;    // [layer, expert]: by the layer's last run
  std::vector<std::uint16_t> ranked_;
  std::vector<std::uint32_t> one_row_;
  std::vector<LayerStats> stats_;
};

}  // namespace spmoe
