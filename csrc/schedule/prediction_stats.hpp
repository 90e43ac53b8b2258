#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/stats.hpp"
#include "schedule/use_forecast.hpp"

namespace spmoe {

/// Counts how many of the experts that layers need were predicted, and how many the layer's run
/// before needed too. Only observes. After construction it allocates nothing. One thread.
class PredictionStats {
 public:
  explicit PredictionStats(const SchedulerShape& shape);

  /// Scores for a layer that has not run, as `UseForecast::predict` takes them.
  void predict(std::uint16_t layer, std::span<const float> scores);

  /// `layer` runs `experts`; `predicted`: with predictions of this iteration. Adds to `stats`.
  void observe(std::uint16_t layer, std::span<const std::uint16_t> experts, bool predicted,
               LayerStats& stats);

  /// The iteration is over: its predictions are spent.
  void end_iteration();

 private:
  [[nodiscard]] std::span<std::uint8_t> row(std::vector<std::uint8_t>& of, std::uint16_t layer);

  SchedulerShape shape_;
  std::vector<std::uint8_t> critical_;  // [layer, expert]: 1 among top-k of a prediction, 2 top-2k
  std::vector<std::uint8_t> needed_;    // [layer, expert]: by the layer's last run
  std::vector<std::uint16_t> ranked_;
};

}  // namespace spmoe
