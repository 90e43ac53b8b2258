#pragma once

#include <cstdint>
#include <vector>

#include "schedule/activation_history.hpp"
#include "schedule/routing_trace.hpp"
#include "schedule/slot_table.hpp"
#include "schedule/use_forecast.hpp"

namespace spmoe {

/// Settings of prefetching that the measured costs of the machine decide. Each policy reads those
/// that concern it; see `LimitedBy`.
struct PrefetchLimits {
  /// Leading layers that drafting prefetches for (the cutoff layer L).
  std::uint16_t cutoff_layer = 0xFFFF;
  /// Bytes that the link can move from now until each layer runs; empty: unknown.
  std::vector<std::uint64_t> budget_bytes;
  /// Bytes that it has moved since.
  std::uint64_t moved_bytes = 0;
  /// Probability of use under which a prefetch costs more than it saves.
  float break_even = 0.5F;
};

/// The view that policies have; all of it outlives them.
struct PolicyView {
  const SchedulerShape& shape;
  const SlotTable& slots;
  const UseForecast& forecast;
  const ActivationHistory& history;
  const RoutingTrace& trace;
  const PrefetchLimits& limits;
};

}  // namespace spmoe
