#include <algorithm>
#include <tuple>

#include "schedule/eviction_policy.hpp"
#include "schedule/routing_trace.hpp"

namespace spmoe {
namespace {

class Belady final : public EvictionPolicy {
 public:
  explicit Belady(const RoutingTrace& trace) : trace_{trace} {}

  void on_fill(SlotIndex, ExpertId) override {}
  void on_use(SlotIndex) override {}

  SlotIndex victim(std::span<const Candidate> candidates, std::uint16_t) override {
    const auto rank = [this](const Candidate& c) {
      return std::tuple{RoutingTrace::never - trace_.next_use(c.resident), c.slot};
    };
    return std::ranges::min_element(candidates, {}, rank)->slot;
  }

 private:
  const RoutingTrace& trace_;
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_belady(const RoutingTrace& trace) {
  return std::make_unique<Belady>(trace);
}

}  // namespace spmoe
