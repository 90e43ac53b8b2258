#include <algorithm>
#include <cmath>
#include <numeric>

#include "schedule/prefetch/prefetch_policy.hpp"

namespace spmoe {

std::size_t count_selected(std::span<const float> scores) {
  return static_cast<std::size_t>(
      std::ranges::count_if(scores, [](float score) { return score > 1 && std::isfinite(score); }));
}

void append_critical(std::span<const float> scores, std::size_t count,
                     std::vector<std::uint16_t>& experts) {
  const auto first = static_cast<std::ptrdiff_t>(experts.size());
  for (std::size_t expert = 0; expert < scores.size(); ++expert) {
    if (scores[expert] > 0 && std::isfinite(scores[expert])) {
      experts.push_back(static_cast<std::uint16_t>(expert));
    }
  }
  const auto begin = experts.begin() + first;
  const auto middle =
      begin + std::min(static_cast<std::ptrdiff_t>(count), std::distance(begin, experts.end()));
  std::partial_sort(begin, middle, experts.end(), [&](std::uint16_t a, std::uint16_t b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
  });
  experts.erase(middle, experts.end());
}

}  // namespace spmoe
