#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "schedule/scheduler.hpp"

// A Scheduler driven step by step, without a device.
namespace spmoe {

inline constexpr std::uint64_t blob_bytes = 1000;

using Experts = std::vector<std::uint16_t>;

inline Experts all_of(std::uint16_t count) {
  Experts experts(count);
  std::iota(experts.begin(), experts.end(), std::uint16_t{0});
  return experts;
}

inline LayerStats total(const Scheduler& scheduler) {
  LayerStats sum;
  for (const LayerStats& layer : scheduler.fills().stats()) sum += layer;
  return sum;
}

inline Scheduler make(std::uint16_t layers, std::uint16_t experts, SlotIndex slots) {
  return Scheduler{{layers, experts, slots, blob_bytes}};
}

/// Starts every fill that may start now, of at least that kind.
inline std::vector<Fill> start(Scheduler& scheduler, FillKind at_least = FillKind::prefetch) {
  std::vector<Fill> fills;
  while (const auto fill = scheduler.next_fill(at_least)) fills.push_back(*fill);
  return fills;
}

inline Experts take(Scheduler& scheduler) {
  std::vector<ReadyExpert> ready;
  scheduler.take_ready(ready);
  Experts experts;
  for (const ReadyExpert& each : ready) experts.push_back(each.expert);
  return experts;
}

/// Runs a need to its end, every fill arriving at once. Returns how many fills there were.
inline std::size_t run(Scheduler& scheduler, std::uint16_t layer, const Experts& experts) {
  scheduler.access(layer, experts);
  std::size_t fills = 0;
  for (std::size_t computed = 0; computed < experts.size();) {
    const auto fill = scheduler.next_fill(FillKind::demand);
    if (fill) {
      scheduler.progress(fill->slot, FillOutcome::arrived);
      ++fills;
    }
    const Experts ready = take(scheduler);
    if (!fill && ready.empty()) {
      ADD_FAILURE() << "the need of layer " << layer << " is stuck";
      break;
    }
    for (const std::uint16_t expert : ready) scheduler.computed(expert);
    computed += ready.size();
  }
  return fills;
}

/// Fills of prefetches that may start now arrive at once. Returns their experts.
inline std::vector<ExpertId> finish_prefetches(Scheduler& scheduler) {
  std::vector<ExpertId> experts;
  while (const auto fill = scheduler.next_fill()) {
    scheduler.progress(fill->slot, FillOutcome::arrived);
    experts.push_back(fill->expert);
  }
  return experts;
}

}  // namespace spmoe
