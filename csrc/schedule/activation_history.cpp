#include "schedule/activation_history.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace spmoe {

ActivationHistory::ActivationHistory(const SchedulerShape& shape)
    : shape_{shape},
      current_(std::size_t{shape.layer_count} * shape.expert_count, 0.0F),
      past_(kept_requests, current_) {}

void ActivationHistory::begin_request() {
  if (std::ranges::all_of(current_, [](float count) { return count == 0; })) return;
  past_[next_past_] = current_;
  next_past_ = (next_past_ + 1) % kept_requests;
  past_count_ = std::min(past_count_ + 1, kept_requests);
  std::ranges::fill(current_, 0.0F);
  nearest_ = nullptr;
  outdated_ = false;
}

void ActivationHistory::observe(std::uint16_t layer, std::span<const std::uint16_t> experts,
                                std::span<const std::uint32_t> rows) {
  for (std::size_t i = 0; i < experts.size(); ++i) {
    current_[std::size_t{layer} * shape_.expert_count + experts[i]] += static_cast<float>(rows[i]);
  }
  outdated_ = true;
}

void ActivationHistory::find_nearest() const {
  outdated_ = false;
  float best = -1;
  for (std::size_t i = 0; i < past_count_; ++i) {
    const Matrix& past = past_[i];
    const float dot = std::inner_product(current_.begin(), current_.end(), past.begin(), 0.0F);
    const float norm = std::inner_product(past.begin(), past.end(), past.begin(), 0.0F);
    const float likeness = norm > 0 ? dot / std::sqrt(norm) : 0;  // the current norm is common
    if (likeness > best) {
      best = likeness;
      nearest_ = &past;
    }
  }
}

float ActivationHistory::share(ExpertId expert) const {
  if (outdated_) find_nearest();
  if (nearest_ == nullptr) return 0;
  const auto row = nearest_->begin() + std::ptrdiff_t{expert.layer} * shape_.expert_count;
  const float total = std::accumulate(row, row + shape_.expert_count, 0.0F);
  return total > 0 ? row[expert.expert] / total : 0;
}

}  // namespace spmoe
