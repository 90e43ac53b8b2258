#include <algorithm>

#include "schedule/prefetch/prefetch_policy.hpp"

namespace spmoe {
namespace {

class NextGate final : public PrefetchPolicy {
 public:
  explicit NextGate(const PolicyView& view) : view_{view} {
    critical_.reserve(view.shape.expert_count);
  }

  void on_prediction(const Prediction& prediction, TransferQueue& queue) override {
    if (prediction.source != PredictionSource::target) return;
    // Every expert that a row's router selects has a score above 1; one row selects top-k.
    const std::size_t selected = count_selected(prediction.scores);
    critical_.clear();
    append_critical(prediction.scores,
                    std::max<std::size_t>(selected, view_.shape.experts_per_token), critical_);
    for (const std::uint16_t expert : critical_) {
      queue.push({prediction.layer, expert}, FillKind::prefetch);
    }
  }

 private:
  PolicyView view_;
  std::vector<std::uint16_t> critical_;
};

}  // namespace

std::unique_ptr<PrefetchPolicy> make_next_gate(const PolicyView& view) {
  return std::make_unique<NextGate>(view);
}

}  // namespace spmoe
