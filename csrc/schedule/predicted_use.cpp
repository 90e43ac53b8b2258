#include <algorithm>
#include <tuple>

#include "schedule/eviction_policy.hpp"
#include "schedule/use_forecast.hpp"

namespace spmoe {
namespace {

class PredictedUse final : public EvictionPolicy {
 public:
  PredictedUse(const UseForecast& forecast, std::uint16_t layer_count)
      : forecast_{forecast}, layer_count_{layer_count} {}

  void on_fill(SlotIndex, ExpertId) override {}
  void on_use(SlotIndex) override {}

  SlotIndex victim(std::span<const Candidate> candidates, std::uint16_t current_layer) override {
    const auto rank = [&](const Candidate& c) {
      const int layers_until_use = (c.resident.layer + layer_count_ - current_layer) % layer_count_;
      return std::tuple{forecast_.value(c.resident, current_layer), -layers_until_use, c.slot};
    };
    return std::ranges::min_element(candidates, {}, rank)->slot;
  }

 private:
  const UseForecast& forecast_;
  int layer_count_;
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_predicted_use(const UseForecast& forecast,
                                                   std::uint16_t layer_count) {
  return std::make_unique<PredictedUse>(forecast, layer_count);
}

}  // namespace spmoe
