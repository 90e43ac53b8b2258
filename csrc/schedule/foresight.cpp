#include "schedule/foresight.hpp"

#include <string>
#include <utility>

#include "base/error.hpp"

namespace spmoe {

Foresight::Foresight(const SchedulerShape& of)
    : shape{of},
      forecast{of},
      history{of},
      trace_{of.layer_count, of.expert_count},
      recorded_{of.layer_count, of.expert_count} {}

void Foresight::observe(std::uint16_t layer, std::span<const std::uint16_t> experts,
                        std::span<const std::uint32_t> rows, std::uint32_t tokens) {
  forecast.observe(layer, experts, rows, tokens);
  history.observe(layer, experts, rows);
  trace_.advance(layer, experts);
  if (recording_) recorded_.append(layer, experts);
}

void Foresight::replay(RoutingTrace trace) {
  if (trace.layer_count() != shape.layer_count || trace.expert_count() != shape.expert_count) {
    throw InvalidArgument{"a trace of " + std::to_string(trace.layer_count()) + " layers of " +
                          std::to_string(trace.expert_count()) + " experts given, but there are " +
                          std::to_string(shape.layer_count) + " layers of " +
                          std::to_string(shape.expert_count)};
  }
  trace_ = std::move(trace);
  trace_.rewind();
}

void Foresight::record(bool on) {
  recording_ = on;
  if (on) recorded_ = RoutingTrace{shape.layer_count, shape.expert_count};
}

}  // namespace spmoe
