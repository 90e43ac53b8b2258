#include <algorithm>
#include <numeric>

#include "schedule/prefetch_policy.hpp"

namespace spmoe {

void append_critical(std::span<const float> scores, std::size_t count,
                     std::vector<std::uint16_t>& experts) {
  const auto first = static_cast<std::ptrdiff_t>(experts.size());
  for (std::uint16_t expert = 0; expert < scores.size(); ++expert) {
    if (scores[expert] > 0) experts.push_back(expert);  // NaN is not
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
