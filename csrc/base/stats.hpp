#pragma once

#include <cstdint>

namespace spmoe {

/// Counters of one MoE layer since the start. Experts are counted once an `access`.
struct LayerStats {
  std::uint64_t hits = 0;                 ///< resident when needed
  std::uint64_t late = 0;                 ///< in flight when needed
  std::uint64_t misses = 0;               ///< not started when needed
  std::uint64_t repeated = 0;             ///< of all these, needed by the layer's run before too
  std::uint64_t demand_bytes = 0;         ///< moved because compute waited for them
  std::uint64_t prefetch_bytes = 0;       ///< moved on a prediction, used or not
  std::uint64_t prefetch_used_bytes = 0;  ///< of these, used before they were evicted
  std::uint64_t predictions = 0;          ///< score vectors received
  std::uint64_t predicted_accesses = 0;   ///< experts needed by runs that were predicted
  std::uint64_t recalled = 0;             ///< of these, among the top-k of a prediction
  std::uint64_t recalled_2k = 0;          ///< of these, among the top-2k
  std::uint64_t critical = 0;             ///< experts among the top-k of those predictions
  std::uint64_t cancelled = 0;            ///< prefetches cancelled before they started
  std::uint64_t cancelled_bytes = 0;      ///< not moved, of prefetches cancelled in flight
  double stall_s = 0;                     ///< compute waited for the link
  double compute_s = 0;                   ///< compute ran

  /// Calls `visit(name, get)` for each counter, in order. `get(it)` is that counter of `it`, a
  /// `LayerStats` or another struct whose counters have the same names.
  template <class Visit>
  static void for_each(const Visit& visit) {
    visit("hits", [](auto& it) -> auto& { return it.hits; });
    visit("late", [](auto& it) -> auto& { return it.late; });
    visit("misses", [](auto& it) -> auto& { return it.misses; });
    visit("repeated", [](auto& it) -> auto& { return it.repeated; });
    visit("demand_bytes", [](auto& it) -> auto& { return it.demand_bytes; });
    visit("prefetch_bytes", [](auto& it) -> auto& { return it.prefetch_bytes; });
    visit("prefetch_used_bytes", [](auto& it) -> auto& { return it.prefetch_used_bytes; });
    visit("predictions", [](auto& it) -> auto& { return it.predictions; });
    visit("predicted_accesses", [](auto& it) -> auto& { return it.predicted_accesses; });
    visit("recalled", [](auto& it) -> auto& { return it.recalled; });
    visit("recalled_2k", [](auto& it) -> auto& { return it.recalled_2k; });
    visit("critical", [](auto& it) -> auto& { return it.critical; });
    visit("cancelled", [](auto& it) -> auto& { return it.cancelled; });
    visit("cancelled_bytes", [](auto& it) -> auto& { return it.cancelled_bytes; });
    visit("stall_s", [](auto& it) -> auto& { return it.stall_s; });
    visit("compute_s", [](auto& it) -> auto& { return it.compute_s; });
  }

  LayerStats& operator+=(const LayerStats& other) noexcept {
    for_each([&](const char*, auto get) { get(*this) += get(other); });
    return *this;
  }
};

}  // namespace spmoe
