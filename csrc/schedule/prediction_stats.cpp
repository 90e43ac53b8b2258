#include "schedule/prediction_stats.hpp"

#include <algorithm>

#include "schedule/prefetch/prefetch_policy.hpp"

namespace spmoe {

PredictionStats::PredictionStats(const SchedulerShape& shape)
    : shape_{shape},
      critical_(std::size_t{shape.layer_count} * shape.expert_count, 0),
      needed_(critical_.size(), 0) {
  ranked_.reserve(shape.expert_count);
}

std::span<std::uint8_t> PredictionStats::row(std::vector<std::uint8_t>& of, std::uint16_t layer) {
  return std::span{of}.subspan(std::size_t{layer} * shape_.expert_count, shape_.expert_count);
}

void PredictionStats::predict(std::uint16_t layer, std::span<const float> scores) {
  const std::size_t k = shape_.experts_per_token;
  const std::size_t top = std::max(k, count_selected(scores));
  ranked_.clear();
  append_critical(scores, top + k, ranked_);
  const std::span critical = row(critical_, layer);
  for (std::size_t rank = 0; rank < ranked_.size(); ++rank) {
    std::uint8_t& level = critical[ranked_[rank]];
    if (rank < top) level = 1;
    if (level == 0) level = 2;
  }
}

void PredictionStats::observe(std::uint16_t layer, std::span<const std::uint16_t> experts,
                              bool predicted, LayerStats& stats) {
  const std::span needed = row(needed_, layer);
  for (const std::uint16_t expert : experts) stats.repeated += needed[expert];
  std::ranges::fill(needed, std::uint8_t{0});
  for (const std::uint16_t expert : experts) needed[expert] = 1;
  if (!predicted) return;
  const std::span critical = row(critical_, layer);
  stats.predicted_accesses += experts.size();
  for (const std::uint16_t expert : experts) {
    stats.recalled += critical[expert] == 1 ? 1 : 0;
    stats.recalled_2k += critical[expert] != 0 ? 1 : 0;
  }
  stats.critical += static_cast<std::uint64_t>(std::ranges::count(critical, 1));
  std::ranges::fill(critical, std::uint8_t{0});
}

void PredictionStats::end_iteration() { std::ranges::fill(critical_, std::uint8_t{0}); }

}  // namespace spmoe
