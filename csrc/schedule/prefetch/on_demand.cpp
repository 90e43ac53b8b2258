#include "schedule/prefetch/prefetch_policy.hpp"

namespace spmoe {
namespace {

class OnDemand final : public PrefetchPolicy {
 public:
  void on_prediction(const Prediction&, TransferQueue&) override {}
};

}  // namespace

std::unique_ptr<PrefetchPolicy> make_on_demand(const PolicyView&) {
  return std::make_unique<OnDemand>();
}

}  // namespace spmoe
