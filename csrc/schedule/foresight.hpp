#pragma once

#include <cstdint>
#include <span>

#include "schedule/policy_view.hpp"

namespace spmoe {

/// Knowledge of a scheduler's policies besides the slots: a forecast of uses, past requests, a
/// recorded trace, and the limits of the machine. Policies refer to it, so it stays where it is.
/// One thread.
class Foresight {
 public:
  explicit Foresight(const SchedulerShape& shape);
  Foresight(const Foresight&) = delete;
  Foresight& operator=(const Foresight&) = delete;

  /// `layer` ran `experts`, `rows[i]` of its `tokens` rows through `experts[i]`.
  void observe(std::uint16_t layer, std::span<const std::uint16_t> experts,
               std::span<const std::uint32_t> rows, std::uint32_t tokens);

  /// The routing that policies which replay one know ahead of time. Starts at its beginning.
  /// @throws InvalidArgument if it is of a model of another shape.
  void replay(RoutingTrace trace);

  /// From now on every access is recorded, or none is. Starting forgets the record before.
  void record(bool on);
  [[nodiscard]] const RoutingTrace& recorded() const noexcept { return recorded_; }

  const SchedulerShape shape;
  UseForecast forecast;
  ActivationHistory history;
  PrefetchLimits limits;

  [[nodiscard]] const RoutingTrace& trace() const noexcept { return trace_; }

 private:
  RoutingTrace trace_;
  RoutingTrace recorded_;
  bool recording_ = false;
};

}  // namespace spmoe
