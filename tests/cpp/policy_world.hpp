#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "schedule/prefetch/prefetch_policy.hpp"

namespace spmoe {

/// All that a policy may look at, for a model without a scheduler.
struct PolicyWorld {
  explicit PolicyWorld(const SchedulerShape& of)
      : shape{of},
        slots{of.slot_count, of.layer_count, of.expert_count},
        forecast{of},
        history{of},
        trace{of.layer_count, of.expert_count} {}
  PolicyWorld(const PolicyWorld&) = delete;
  PolicyWorld& operator=(const PolicyWorld&) = delete;

  [[nodiscard]] PolicyView view() const { return {shape, slots, forecast, history, trace, limits}; }

  /// `layer` runs `experts`, one row each.
  void run(std::uint16_t layer, std::span<const std::uint16_t> experts) {
    const std::vector<std::uint32_t> rows(experts.size(), 1);
    forecast.observe(layer, experts, rows, 1);
    history.observe(layer, experts, rows);
    trace.advance(layer, experts);
  }

  void make_resident(ExpertId expert) {
    const SlotIndex slot = slots.find_empty().value();
    slots.begin_fill(slot, expert);
    slots.finish_fill(slot);
  }

  SchedulerShape shape;
  SlotTable slots;
  UseForecast forecast;
  ActivationHistory history;
  RoutingTrace trace;
  PrefetchLimits limits;
};

}  // namespace spmoe
