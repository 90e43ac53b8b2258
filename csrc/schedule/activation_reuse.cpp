#include <algorithm>
#include <tuple>

#include "schedule/activation_history.hpp"
#include "schedule/eviction_policy.hpp"

namespace spmoe {
namespace {

class ActivationReuse final : public EvictionPolicy {
 public:
  explicit ActivationReuse(const ActivationHistory& history) : history_{history} {}

  void on_fill(SlotIndex, ExpertId) override {}
  void on_use(SlotIndex) override {}

  SlotIndex victim(std::span<const Candidate> candidates, std::uint16_t) override {
    const auto rank = [this](const Candidate& c) {
      const auto layers = static_cast<float>(history_.shape().layer_count);
      // The source's small constant keeps the order of layers among experts never seen.
      const float reuse = (history_.share(c.resident) + 1e-3F) *
                          (1 - static_cast<float>(c.resident.layer) / layers);
      return std::tuple{reuse, c.slot};
    };
    return std::ranges::min_element(candidates, {}, rank)->slot;
  }

 private:
  const ActivationHistory& history_;
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_activation_reuse(const ActivationHistory& history) {
  return std::make_unique<ActivationReuse>(history);
}

}  // namespace spmoe
