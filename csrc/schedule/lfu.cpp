#include <algorithm>
#include <tuple>
#include <vector>

#include "schedule/eviction_policy.hpp"

namespace spmoe {
namespace {

class Lfu final : public EvictionPolicy {
 public:
  explicit Lfu(SlotIndex slot_count) : slots_(slot_count) {}

  void on_fill(SlotIndex slot, ExpertId) override { slots_[slot] = {0, ++clock_}; }
  void on_use(SlotIndex slot) override { slots_[slot] = {slots_[slot].uses + 1, ++clock_}; }

  SlotIndex victim(std::span<const Candidate> candidates, std::uint16_t) override {
    const auto rank = [this](const Candidate& c) {
      return std::tuple{slots_[c.slot].uses, slots_[c.slot].last_use, c.slot};
    };
    return std::ranges::min_element(candidates, {}, rank)->slot;
  }

 private:
  struct Use {
    std::uint64_t uses = 0;
    std::uint64_t last_use = 0;
  };
  std::vector<Use> slots_;
  std::uint64_t clock_ = 0;
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_lfu(SlotIndex slot_count) {
  return std::make_unique<Lfu>(slot_count);
}

}  // namespace spmoe
