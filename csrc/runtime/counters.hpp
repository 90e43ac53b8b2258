#pragma once

#include <cstdint>
#include <type_traits>

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
  std::int64_t predicted_accesses = 0;
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

  /// Calls `visit(name, get)` for each counter; see `LayerStats::for_each`.
  template <class Visit>
  static void for_each(const Visit& visit) {
    LayerStats::for_each(visit);
    visit("link_bytes", [](auto& it) -> auto& { return it.link_bytes; });
    visit("iterations", [](auto& it) -> auto& { return it.iterations; });
    visit("accepted", [](auto& it) -> auto& { return it.accepted; });
    visit("link_busy_s", [](auto& it) -> auto& { return it.link_busy_s; });
  }

  Counters& operator+=(const Counters& other) noexcept {
    for_each([&](const char*, auto get) { get(*this) += get(other); });
    return *this;
  }
  Counters& operator-=(const Counters& other) noexcept {
    for_each([&](const char*, auto get) { get(*this) -= get(other); });
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
  Counters counters{.link_bytes = static_cast<std::int64_t>(stats.link.bytes),
                    .iterations = static_cast<std::int64_t>(stats.iterations),
                    .accepted = static_cast<std::int64_t>(stats.accepted),
                    .link_busy_s = stats.link.busy_s};
  LayerStats::for_each([&](const char*, auto get) {
    auto& counter = get(counters);
    counter = static_cast<std::decay_t<decltype(counter)>>(get(total));
  });
  return counters;
}

}  // namespace spmoe
