#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/types.hpp"
#include "schedule/policy_view.hpp"
#include "schedule/transfer_queue.hpp"

namespace spmoe {

/// Which model's state a prediction was made from.
enum class PredictionSource : std::uint8_t { draft, target };

/// The expected choice of a router of the target for one or more tokens.
struct Prediction {
  std::uint16_t layer;
  PredictionSource source;
  std::span<const float> scores;  ///< [expert_count], as `UseForecast::predict` takes them
};

/// A prefetch that would take the slot of a resident expert.
struct Admission {
  ExpertId incoming;
  ExpertId victim;
};

/// Turns predictions into prefetches, which it keeps in the transfer queue. The scheduler calls
/// it, updates the forecast before it does, and leaves out of service what is resident already.
/// When a layer is needed, the scheduler cancels its prefetches itself, those in flight too
/// unless the policy keeps them. Implementations need no lock and must not call back.
class PrefetchPolicy {
 public:
  virtual ~PrefetchPolicy() = default;

  virtual void on_prediction(const Prediction& prediction, TransferQueue& queue) = 0;

  /// The target runs `experts` of `layer` now.
  virtual void on_access(std::uint16_t /*layer*/, std::span<const std::uint16_t> /*experts*/,
                         TransferQueue& /*queue*/) {}

  virtual void on_end_iteration(TransferQueue& /*queue*/) {}

  /// Whether a prefetch may take its victim's slot. If not, it waits for another chance.
  [[nodiscard]] virtual bool admits(const Admission& /*admission*/) const { return true; }

  /// Whether a prefetch in flight is worth finishing although its reason is gone: its layer has run
  /// without the expert, or the iteration that predicted it has ended. If not, it is cancelled.
  /// Asked after `on_access` or `on_end_iteration`.
  [[nodiscard]] virtual bool keeps(ExpertId /*expert*/) const { return false; }
};

/// Nothing is prefetched. Source: Mixtral-Offloading, arXiv:2312.17238 (with LRU).
std::unique_ptr<PrefetchPolicy> make_on_demand(const PolicyView& view);

/// The experts that the target's next gates choose for the state of the running layer, first
/// come first served. Source: AdapMoE, arXiv:2408.10284, whose code predicts for one token at a
/// time only; this one does for every row of a verification.
std::unique_ptr<PrefetchPolicy> make_next_gate(const PolicyView& view);

/// The experts that the nearest past request used in the layers to come, by share and nearness.
/// Source: MoE-Infinity, arXiv:2401.14361, section 4.
std::unique_ptr<PrefetchPolicy> make_activation_trace(const PolicyView& view);

/// The critical experts (top-k of each drafted token) of the leading layers up to the cutoff
/// layer, first come first served. Source: SP-MoE, arXiv:2510.10302, section 3.
std::unique_ptr<PrefetchPolicy> make_sp_moe(const PolicyView& view);

/// All layers' predictions, joined over the drafted tokens, in the order of their deadlines and
/// by calibrated probability; admitted where that saves more fills than the victim's leaving
/// costs. Planned again with each drafted token.
std::unique_ptr<PrefetchPolicy> make_horizon(const PolicyView& view);

/// Perfect knowledge: the trace's next accesses in order, each filled only if it is used before its
/// victim would be.
std::unique_ptr<PrefetchPolicy> make_oracle(const PolicyView& view);

/// Experts that the router of some row selected: those with a finite score above 1.
[[nodiscard]] std::size_t count_selected(std::span<const float> scores);

/// Appends the `count` experts of the highest scores to `experts`, highest first, the lowest index
/// first of equals; only finite scores above 0.
void append_critical(std::span<const float> scores, std::size_t count,
                     std::vector<std::uint16_t>& experts);

}  // namespace spmoe
