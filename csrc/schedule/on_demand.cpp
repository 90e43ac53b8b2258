#include "schedule/prefetch_policy.hpp"

namespace spmoe {
namespace {

class OnDemand final : public PrefetchPolicy {
 public:
  std::string_view name() const noexcept override { return "on-demand"; }
  void on_prediction(const Prediction&, TransferQueue&) override {}
};

}  // namespace

std::unique_ptr<PrefetchPolicy> make_on_demand() { return std::make_unique<OnDemand>(); }

}  // namespace spmoe
