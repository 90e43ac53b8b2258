#include <algorithm>

#include "schedule/prefetch/prefetch_policy.hpp"

namespace spmoe {
namespace {

// The source prefetches whatever it has seen; a share under this is as good as never seen.
constexpr float least_share = 0.02F;

class ActivationTrace final : public PrefetchPolicy {
 public:
  explicit ActivationTrace(const PolicyView& view) : view_{view} {}

  void on_prediction(const Prediction&, TransferQueue&) override {}

  void on_access(std::uint16_t layer, std::span<const std::uint16_t>,
                 TransferQueue& queue) override {
    queue.cancel_all(FillKind::prefetch);  // the nearest request may be another one now
    const int layers = view_.shape.layer_count;
    for (int ahead = 1; ahead < layers && layer + ahead < layers; ++ahead) {
      for (std::uint16_t expert = 0; expert < view_.shape.expert_count; ++expert) {
        const ExpertId id{static_cast<std::uint16_t>(layer + ahead), expert};
        const float share = view_.history.share(id);
        if (share < least_share) continue;
        const double nearness = 1 - static_cast<double>(ahead) / layers;
        queue.push(id, FillKind::prefetch, -share * nearness);
      }
    }
  }

  void on_end_iteration(TransferQueue& queue) override {
    queue.cancel_all(FillKind::prefetch);
    for (std::uint16_t expert = 0; expert < view_.shape.expert_count; ++expert) {
      const float share = view_.history.share({0, expert});
      if (share >= least_share) queue.push({0, expert}, FillKind::prefetch, -share);
    }
  }

 private:
  PolicyView view_;
};

}  // namespace

std::unique_ptr<PrefetchPolicy> make_activation_trace(const PolicyView& view) {
  return std::make_unique<ActivationTrace>(view);
}

}  // namespace spmoe
