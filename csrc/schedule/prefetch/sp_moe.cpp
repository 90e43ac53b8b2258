#include "schedule/prefetch/prefetch_policy.hpp"

namespace spmoe {
namespace {

class SpMoe final : public PrefetchPolicy {
 public:
  explicit SpMoe(const PolicyView& view) : view_{view} {
    critical_.reserve(view.shape.expert_count);
  }

  void on_prediction(const Prediction& prediction, TransferQueue& queue) override {
    if (prediction.source != PredictionSource::draft) return;
    if (prediction.layer >= view_.limits.cutoff_layer) return;
    critical_.clear();
    append_critical(prediction.scores, view_.shape.experts_per_token, critical_);
    for (const std::uint16_t expert : critical_) {
      queue.push({prediction.layer, expert}, FillKind::prefetch);
    }
  }

 private:
  PolicyView view_;
  std::vector<std::uint16_t> critical_;
};

}  // namespace

std::unique_ptr<PrefetchPolicy> make_sp_moe(const PolicyView& view) {
  return std::make_unique<SpMoe>(view);
}

}  // namespace spmoe
