#include <algorithm>
#include <tuple>
#include <vector>

#include "schedule/eviction_policy.hpp"

namespace spmoe {
namespace {

class LeastStale final : public EvictionPolicy {
 public:
  LeastStale(SlotIndex slot_count, std::uint16_t layer_count)
      : slots_(slot_count), layer_count_{layer_count} {}

  void on_fill(SlotIndex slot, ExpertId) override { touch(slot); }
  void on_use(SlotIndex slot) override { touch(slot); }
  void on_end_iteration() override { ++pass_; }

  SlotIndex victim(std::span<const Candidate> candidates, std::uint16_t current_layer) override {
    const auto rank = [&](const Candidate& c) {
      const Touch& touched = slots_[c.slot];
      if (touched.pass == pass_) return std::tuple{1, 0, touched.time, c.slot};
      const bool behind = c.resident.layer < current_layer;
      const int place = c.resident.layer + (behind ? 0 : layer_count_);
      return std::tuple{0, place, touched.time, c.slot};
    };
    return std::ranges::min_element(candidates, {}, rank)->slot;
  }

 private:
  struct Touch {
    std::uint64_t pass = 0;
    std::uint64_t time = 0;
  };
  void touch(SlotIndex slot) { slots_[slot] = {pass_, ++clock_}; }

  std::vector<Touch> slots_;
  std::uint64_t pass_ = 0;
  std::uint64_t clock_ = 0;
  int layer_count_;
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_least_stale(SlotIndex slot_count, std::uint16_t layer_count) {
  return std::make_unique<LeastStale>(slot_count, layer_count);
}

}  // namespace spmoe
