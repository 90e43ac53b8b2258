#include <algorithm>

#include "schedule/prefetch/prefetch_policy.hpp"

namespace spmoe {
namespace {

// Fills that a swap must save on average to be worth its own.
constexpr float swap_gain = 0.2F;

// A resident expert stays until its layer has run if it is likelier used than not. Others compete
// by their value: were they all to stay, the link would idle while the draft writes.
constexpr float kept_probability = 0.5F;

class Horizon final : public PrefetchPolicy {
 public:
  explicit Horizon(const PolicyView& view) : view_{view} {
    planned_.reserve(std::size_t{view.shape.layer_count} * view.shape.expert_count);
  }

  void on_prediction(const Prediction& prediction, TransferQueue& queue) override {
    // Predictions run through the layers in order; an earlier layer begins another token.
    const bool another_token = prediction.layer <= last_layer_;
    const bool token_complete = prediction.layer + 1 == view_.shape.layer_count;
    last_layer_ = prediction.layer;
    if ((another_token || token_complete) && !view_.limits.budget_bytes.empty()) {
      plan(queue);
    } else {
      plan_layer(prediction.layer, queue);
    }
  }

  void on_access(std::uint16_t layer, std::span<const std::uint16_t>, TransferQueue&) override {
    next_layer_ = static_cast<std::uint16_t>((layer + 1) % view_.shape.layer_count);
  }

  void on_end_iteration(TransferQueue& queue) override {
    last_layer_ = 0xFFFF;
    next_layer_ = 0;
    queue.cancel_all(FillKind::prefetch);
  }

  bool admits(const Admission& admission) const override {
    const UseForecast& forecast = view_.forecast;
    const float probability = forecast.probability(admission.incoming);
    if (probability < view_.limits.break_even) return false;
    const float victim = forecast.value(admission.victim, next_layer_);
    if (forecast.ran(admission.victim.layer)) {
      // The demand that the prefetch stands in for would take the same slot: the victim is lost
      // for nothing only if the prefetch is wrong.
      return probability - (1 - probability) * victim > swap_gain;
    }
    // The victim may be needed in this very pass. An idle link is lost for good, so a fill now
    // saves one later, as often as it is right; what it costs is the victim's fill, as often as the
    // victim would have been used.
    return forecast.value(admission.incoming, next_layer_) > victim + swap_gain;
  }

  /// A fill that would be admitted in the place of an expert without value, as an empty slot holds
  /// none: the slot is given already, and the rest of the blob costs no more than the whole.
  bool keeps(ExpertId expert) const override {
    return view_.forecast.probability(expert) >= view_.limits.break_even &&
           view_.forecast.value(expert, next_layer_) > swap_gain;
  }

 private:
  struct Planned {
    ExpertId expert;
    float probability;
  };

  void plan_layer(std::uint16_t layer, TransferQueue& queue) {
    for (std::uint16_t expert = 0; expert < view_.shape.expert_count; ++expert) {
      const float probability = view_.forecast.probability({layer, expert});
      const bool resident = view_.slots.find({layer, expert}).has_value();
      const float least =
          resident ? std::max(view_.limits.break_even, kept_probability) : view_.limits.break_even;
      if (probability >= least) {
        queue.push({layer, expert}, FillKind::prefetch, order(layer, probability));
      } else {
        queue.cancel({layer, expert}, FillKind::prefetch);
      }
    }
  }

  /// Earliest deadline first, the likelier first within a layer.
  static double order(std::uint16_t layer, float probability) { return layer + 1.0 - probability; }

  /// Plans all layers again. Prefetches that arrive before their layer runs come first, in the
  /// order of deadlines. The others follow: a late prefetch is better than none. To meet a
  /// deadline, the least likely prefetch due by then is postponed (Moore and Hodgson's rule, with
  /// values).
  void plan(TransferQueue& queue) {
    queue.cancel_all(FillKind::prefetch);
    planned_.clear();
    for (std::uint16_t layer = 0; layer < view_.shape.layer_count; ++layer) {
      if (!view_.forecast.predicted(layer)) continue;
      for (std::uint16_t expert = 0; expert < view_.shape.expert_count; ++expert) {
        const float probability = view_.forecast.probability({layer, expert});
        if (probability < view_.limits.break_even || view_.slots.find({layer, expert})) continue;
        planned_.push_back({{layer, expert}, probability});
      }
      const std::uint64_t budget = view_.limits.budget_bytes[layer];
      const std::uint64_t room =
          (budget - std::min(budget, view_.limits.moved_bytes)) / view_.shape.blob_bytes;
      while (planned_.size() > room) {
        const auto least = std::ranges::min_element(planned_, {}, &Planned::probability);
        queue.push(least->expert, FillKind::prefetch,
                   view_.shape.layer_count + order(least->expert.layer, least->probability));
        *least = planned_.back();
        planned_.pop_back();
      }
    }
    for (const Planned& planned : planned_) {
      queue.push(planned.expert, FillKind::prefetch,
                 order(planned.expert.layer, planned.probability));
    }
  }

  PolicyView view_;
  std::vector<Planned> planned_;
  std::uint16_t last_layer_ = 0xFFFF;  // of the latest prediction
  std::uint16_t next_layer_ = 0;       // to run
};

}  // namespace

std::unique_ptr<PrefetchPolicy> make_horizon(const PolicyView& view) {
  return std::make_unique<Horizon>(view);
}

}  // namespace spmoe
