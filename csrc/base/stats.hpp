#pragma once

#include <cstdint>

namespace spmoe {

/// Counters of one MoE layer since the start. Experts are counted once a `need`.
struct LayerStats {
  std::uint64_t hits = 0;                 ///< resident when needed
  std::uint64_t late = 0;                 ///< in flight when needed
  std::uint64_t misses = 0;               ///< not started when needed
  std::uint64_t repeated = 0;             ///< of all these, needed by the layer's run before too
  std::uint64_t demand_bytes = 0;         ///< moved because compute waited for them
  std::uint64_t prefetch_bytes = 0;       ///< moved on a prediction, used or not
  std::uint64_t prefetch_used_bytes = 0;  ///< of these, used before they were evicted
  std::uint64_t predictions = 0;          ///< score vectors received
  std::uint64_t predicted_needs = 0;      ///< experts needed by runs that were predicted
  std::uint64_t recalled = 0;             ///< of these, among the top-k of a prediction
  std::uint64_t recalled_2k = 0;          ///< of these, among the top-2k
  std::uint64_t critical = 0;             ///< experts among the top-k of those predictions
  std::uint64_t cancelled = 0;            ///< prefetches cancelled before they started
  std::uint64_t cancelled_bytes = 0;      ///< not moved, of prefetches cancelled in flight
  double stall_s = 0;                     ///< compute waited for the link
  double compute_s = 0;                   ///< compute ran

  LayerStats& operator+=(const LayerStats& other) noexcept {
    hits += other.hits;
    late += other.late;
    misses += other.misses;
    repeated += other.repeated;
    demand_bytes += other.demand_bytes;
    prefetch_bytes += other.prefetch_bytes;
    prefetch_used_bytes += other.prefetch_used_bytes;
    predictions += other.predictions;
    predicted_needs += other.predicted_needs;
    recalled += other.recalled;
    recalled_2k += other.recalled_2k;
    critical += other.critical;
    cancelled += other.cancelled;
    cancelled_bytes += other.cancelled_bytes;
    stall_s += other.stall_s;
    compute_s += other.compute_s;
    return *this;
  }
};

}  // namespace spmoe
