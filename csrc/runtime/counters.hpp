#pragma once

#include <cstdint>

#include "runtime/runtime.hpp"

namespace spmoe {

/// Counters of a runtime, over all its layers. The difference of two says what happened between
/// them. Signed: prefetches of an earlier time may be used in a later one.
struct Counters {
  std::int64_t hits = 0;    ///< experts that were resident when needed
  std::int64_t late = 0;    ///< in flight when needed
  std::int64_t misses = 0;  ///< not started when needed
  std::int64_t repeated = 0;
  std::int64_t demand_bytes = 0;
  std::int64_t prefetch_bytes = 0;
  std::int64_t prefetch_used_bytes = 0;
  std::int64_t predictions = 0;
  std::int64_t predicted_needs = 0;
  std::int64_t recalled = 0;
  std::int64_t recalled_2k = 0;
  std::int64_t critical = 0;
  std::int64_t cancelled = 0;
  std::int64_t cancelled_bytes = 0;
  std::int64_t link_bytes = 0;
  std::int64_t iterations = 0;
  std::int64_t accepted = 0;
  double link_busy_s = 0;
  double stall_s = 0;
  double compute_s = 0;

  bool operator==(const Counters&) const = default;

  /// Calls `visit(name, member)` for each counter, in order.
  template <class Visit>
  static void for_each(Visit&& visit) {
    visit("hits", &Counters::hits);
    visit("late", &Counters::late);
    visit("misses", &Counters::misses);
    visit("repeated", &Counters::repeated);
    visit("demand_bytes", &Counters::demand_bytes);
    visit("prefetch_bytes", &Counters::prefetch_bytes);
    visit("prefetch_used_bytes", &Counters::prefetch_used_bytes);
    visit("predictions", &Counters::predictions);
    visit("predicted_needs", &Counters::predicted_needs);
    visit("recalled", &Counters::recalled);
    visit("recalled_2k", &Counters::recalled_2k);
    visit("critical", &Counters::critical);
    visit("cancelled", &Counters::cancelled);
    visit("cancelled_bytes", &Counters::cancelled_bytes);
    visit("link_bytes", &Counters::link_bytes);
    visit("iterations", &Counters::iterations);
    visit("accepted", &Counters::accepted);
    visit("link_busy_s", &Counters::link_busy_s);
    visit("stall_s", &Counters::stall_s);
    visit("compute_s", &Counters::compute_s);
  }

  Counters& operator+=(const Counters& other) noexcept {
    for_each([&](const char*, auto member) { this->*member += other.*member; });
    return *this;
  }
  Counters& operator-=(const Counters& other) noexcept {
    for_each([&](const char*, auto member) { this->*member -= other.*member; });
    return *this;
  }
  friend Counters operator+(Counters left, const Counters& right) noexcept { return left += right; }
  friend Counters operator-(Counters left, const Counters& right) noexcept { return left -= right; }

  /// Experts that layers asked for.
  [[nodiscard]] std::int64_t needed() const noexcept { return hits + late + misses; }

  /// Moved on a prediction and not used (yet).
  [[nodiscard]] std::int64_t prefetch_wasted_bytes() const noexcept {
    return prefetch_bytes - prefetch_used_bytes;
  }
};

/// The counters of `stats`, its layers added up.
[[nodiscard]] inline Counters add_up(const RuntimeStats& stats) {
  LayerStats total;
  for (const LayerStats& layer : stats.layers) total += layer;
  const auto whole = [](std::uint64_t count) { return static_cast<std::int64_t>(count); };
  return {.hits = whole(total.hits),
          .late = whole(total.late),
          .misses = whole(total.misses),
          .repeated = whole(total.repeated),
          .demand_bytes = whole(total.demand_bytes),
          .prefetch_bytes = whole(total.prefetch_bytes),
          .prefetch_used_bytes = whole(total.prefetch_used_bytes),
          .predictions = whole(total.predictions),
          .predicted_needs = whole(total.predicted_needs),
          .recalled = whole(total.recalled),
          .recalled_2k = whole(total.recalled_2k),
          .critical = whole(total.critical),
          .cancelled = whole(total.cancelled),
          .cancelled_bytes = whole(total.cancelled_bytes),
          .link_bytes = whole(stats.link.bytes),
          .iterations = whole(stats.iterations),
          .accepted = whole(stats.accepted),
          .link_busy_s = stats.link.busy_s,
          .stall_s = total.stall_s,
          .compute_s = total.compute_s};
}

}  // namespace spmoe
