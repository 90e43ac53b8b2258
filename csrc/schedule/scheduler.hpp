#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/types.hpp"
#include "schedule/fill_table.hpp"
#include "schedule/foresight.hpp"
#include "schedule/policies.hpp"
#include "schedule/prediction_stats.hpp"

namespace spmoe {

/// A fill to start now: copy the whole blob of `expert` into `slot`.
struct Fill {
  ExpertId expert;
  SlotIndex slot;
  FillKind kind;
};

/// Progress of a fill in flight. All but `issued` end it.
enum class FillOutcome : std::uint8_t {
  issued,     ///< compute may be ordered behind it; reported at most once
  arrived,    ///< whole, even if it was cancelled
  cancelled,  ///< with a part of its bytes; not after `issued`
  failed      ///< with a part of its bytes
};

/// Whose results a failed fill spoils.
enum class FailureScope : std::uint8_t {
  nothing,
  access,  ///< those of the running access, which cannot end
  results  ///< of an access that has ended, or an expert of the running one that was computed
};

/// An expert that may be computed now, leased until `computed` is called for it.
struct ReadyExpert {
  std::uint16_t expert;
  SlotIndex slot;
  bool in_flight = false;  ///< only behind its fill, which is issued and has not ended
};

/// Decides which expert is filled into which slot, and when. A state machine: it owns no thread,
/// reads no clock and moves no byte, so that the worker, a unit test and a simulator can drive it.
/// One thread, or the caller's lock. After construction it allocates nothing, `replay` and
/// recording apart.
///
/// It holds decisions and leases. `FillTable` holds the state of each fill and slot, `Foresight`
/// what policies know, `PredictionStats` counts how predictions come true.
///
/// One access at a time: `access` opens it, `take_ready` and `computed` consume it, and it ends
/// when every expert has been computed or by `abandon_access`. Meanwhile `FillTable::next_change`,
/// `next_fill` and `progress` move the transfers on. Where compute can be ordered behind a fill,
/// `FillOutcome::issued` makes its expert ready before it has arrived.
///
/// A prefetch in flight is cancelled when its layer runs without its expert, or when the iteration
/// that predicted it ends and its layer has not run, unless the policy keeps it. After a
/// verification every layer has run, so the second concerns drafts that were never verified. A
/// cancelled fill still has its slot until its end is reported: one that is needed meanwhile is a
/// miss, demanded again, and read again unless the first turns out to have arrived whole.
class Scheduler {
 public:
  /// @throws InvalidArgument if a policy of that name does not exist.
  explicit Scheduler(const SchedulerShape& shape, const PolicyNames& names = {});

  /// A request begins: what earlier ones did becomes the past; see `ActivationHistory`. If the one
  /// before ended early, in the middle of an iteration, that iteration ends here.
  void begin_request();

  /// The expected choice of the router of `layer` for one or more tokens: [expert_count], as
  /// `UseForecast::predict` takes them. Scores for a layer that has run already are ignored.
  void predict(std::uint16_t layer, std::span<const float> scores,
               PredictionSource source = PredictionSource::draft);

  /// The experts to prefetch, in this order, whatever the policy makes of scores. They replace all
  /// prefetches that wait, those of the next layer of a prompt apart, and end as those do: when
  /// their layer runs, or the iteration ends.
  void predict(std::span<const ExpertId> experts);

  /// The target runs `experts` of `layer` now; distinct. Residents are leased at once, the others
  /// become demands, ahead of every prefetch. In a pass of a prompt (more than 32 tokens, or all
  /// experts of the layer), those of the next layer are read ahead into spare slots.
  /// @param rows of each expert, `tokens` in all; empty: one each.
  void access(std::uint16_t layer, std::span<const std::uint16_t> experts,
              std::span<const std::uint32_t> rows = {}, std::uint32_t tokens = 1);

  /// Appends the experts of the running access that became ready since the last call, in the order
  /// in which they arrived.
  void take_ready(std::vector<ReadyExpert>& ready);

  /// Compute has finished with an expert of the running access: its lease ends.
  void computed(std::uint16_t expert);

  /// Gives the running access up: ends its leases and takes its demands back.
  void abandon_access();

  /// The next fill to start, with its slot assigned, or none: nothing waits, or every slot is
  /// leased, being filled or worth more than what waits. Demands come first. Changes of fills in
  /// flight are to be taken before, from `fills()`; a driver that never asks lets such fills
  /// arrive.
  [[nodiscard]] std::optional<Fill> next_fill(FillKind at_least = FillKind::prefetch);

  /// The fill in flight into `slot` has come to `outcome`.
  /// @param bytes_moved of a fill that was cancelled or failed.
  /// @return of a failure, what it spoils. A prefetch that is needed becomes a demand, and spoils
  ///         nothing.
  FailureScope progress(SlotIndex slot, FillOutcome outcome, std::uint64_t bytes_moved = 0);

  /// The iteration is over: predictions that were not used lose their protection, and prefetches
  /// for layers that did not run are cancelled.
  void end_iteration();

  /// Fills, slots and counters. A driver only looks, and takes changes of fills in flight.
  [[nodiscard]] FillTable& fills() noexcept { return *fills_; }
  [[nodiscard]] const FillTable& fills() const noexcept { return *fills_; }

  /// Knowledge of policies; a driver sets limits, and routing to replay or to record.
  [[nodiscard]] Foresight& foresight() noexcept { return *foresight_; }
  [[nodiscard]] const Foresight& foresight() const noexcept { return *foresight_; }

 private:
  enum class Want : std::uint8_t { none, waiting, leased };

  [[nodiscard]] bool waited_for(ExpertId expert) const;  // by the running access
  void become_ready(SlotIndex slot);
  void forget_predictions(std::uint16_t layer);
  void cancel_unless_kept(SlotIndex slot);
  void read_ahead(std::uint16_t layer);
  void finish_fill(SlotIndex slot);
  FailureScope fail_fill(SlotIndex slot, std::uint64_t bytes_moved);
  [[nodiscard]] std::optional<SlotIndex> find_victim(FillKind incoming);
  void keep_latest_used();  // of the candidates
  [[nodiscard]] bool may_evict(const TransferQueue::Entry& incoming, SlotIndex victim) const;
  [[nodiscard]] std::size_t find_startable(FillKind at_least);

  SchedulerShape shape_;
  std::unique_ptr<Foresight> foresight_;  // which policies refer to, as to the slots of `fills_`
  std::unique_ptr<FillTable> fills_;
  std::unique_ptr<EvictionPolicy> eviction_;
  std::unique_ptr<PrefetchPolicy> prefetch_;
  PredictionStats prediction_stats_;
  bool iterating_ = false;   // something was predicted or needed since the last iteration's end
  std::uint16_t layer_ = 0;  // of the running or the last access
  std::uint16_t next_layer_ = 0;  // that will be needed next: what `layer_` needs is leased
  static constexpr std::uint16_t no_layer = 0xFFFF;
  std::uint16_t ahead_layer_ = no_layer;  // of the running prompt, being read ahead
  std::vector<Want> wants_;               // by expert of `layer_`
  std::vector<ReadyExpert> ready_;
  std::vector<Candidate> candidates_;
  std::vector<std::uint32_t> one_row_;
};

}  // namespace spmoe
