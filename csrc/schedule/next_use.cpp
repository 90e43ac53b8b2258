#include <algorithm>
#include <tuple>
#include <vector>

#include "schedule/eviction_policy.hpp"

namespace spmoe {
namespace {

class NextUse final : public EvictionPolicy {
 public:
  NextUse(SlotIndex slot_count, std::uint16_t layer_count)
      : last_use_(slot_count, 0), layer_count_{layer_count} {}

  void on_fill(SlotIndex slot, ExpertId) override { last_use_[slot] = ++clock_; }
  void on_use(SlotIndex slot) override { last_use_[slot] = ++clock_; }

  SlotIndex victim(std::span<const Candidate> candidates, std::uint16_t current_layer) override {
    const auto rank = [&](const Candidate& c) {
      const int layers_until_use = (c.resident.layer + layer_count_ - current_layer) % layer_count_;
      return std::tuple{-layers_until_use, last_use_[c.slot], c.slot};
    };
    return std::ranges::min_element(candidates, {}, rank)->slot;
  }

 private:
  std::vector<std::uint64_t> last_use_;
  std::uint64_t clock_ = 0;
  int layer_count_;
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_next_use(SlotIndex slot_count, std::uint16_t layer_count) {
  return std::make_unique<NextUse>(slot_count, layer_count);
}

}  // namespace spmoe
