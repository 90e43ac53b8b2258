#include <algorithm>
#include <tuple>
#include <vector>

#include "schedule/eviction_policy.hpp"

namespace spmoe {
namespace {

class Lru final : public EvictionPolicy {
 public:
  explicit Lru(SlotIndex slot_count) : last_use_(slot_count, 0) {}

  void on_fill(SlotIndex slot, ExpertId) override { last_use_[slot] = ++clock_; }
  void on_use(SlotIndex slot) override { last_use_[slot] = ++clock_; }

  SlotIndex victim(std::span<const Candidate> candidates, std::uint16_t) override {
    const auto age = [&](const Candidate& c) { return std::tuple{last_use_[c.slot], c.slot}; };
    return std::ranges::min_element(candidates, {}, age)->slot;
  }

 private:
  std::vector<std::uint64_t> last_use_;
  std::uint64_t clock_ = 0;
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_lru(SlotIndex slot_count) {
  return std::make_unique<Lru>(slot_count);
}

}  // namespace spmoe
