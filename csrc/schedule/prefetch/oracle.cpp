#include <algorithm>

#include "schedule/prefetch/prefetch_policy.hpp"

namespace spmoe {
namespace {

class Oracle final : public PrefetchPolicy {
 public:
  explicit Oracle(const PolicyView& view) : view_{view} {}

  void on_prediction(const Prediction&, TransferQueue&) override {}
  void on_access(std::uint16_t, std::span<const std::uint16_t>, TransferQueue& queue) override {
    plan(queue);
  }
  void on_end_iteration(TransferQueue& queue) override { plan(queue); }

  /// Experts that are planned: those used again within a pass over the layers.
  bool keeps(ExpertId expert) const override {
    return view_.trace.next_use(expert) < view_.shape.layer_count;
  }

  bool admits(const Admission& admission) const override {
    return view_.trace.next_use(admission.incoming) < view_.trace.next_use(admission.victim);
  }

 private:
  /// Looks one pass over the layers ahead: no further use can deserve a slot earlier.
  void plan(TransferQueue& queue) const {
    queue.cancel_all(FillKind::prefetch);
    const std::size_t needs =
        std::min<std::size_t>(view_.trace.remaining(), view_.shape.layer_count);
    for (std::size_t i = 0; i < needs; ++i) {
      const RoutingTrace::Access need = view_.trace.upcoming(i);
      for (const std::uint16_t expert : need.experts) {
        const ExpertId id{need.layer, expert};
        if (view_.trace.next_use(id) < i) continue;  // waits already, for that use
        queue.push(id, FillKind::prefetch, static_cast<double>(i));
      }
    }
  }

  PolicyView view_;
};

}  // namespace

std::unique_ptr<PrefetchPolicy> make_oracle(const PolicyView& view) {
  return std::make_unique<Oracle>(view);
}

}  // namespace spmoe
