#include "schedule/use_forecast.hpp"

#include <algorithm>
#include <cmath>

namespace spmoe {
namespace {

// A run moves the frequency by so much: about the last ten count.
constexpr float frequency_step = 0.1F;

// Weight of the belief that a bucket starts with, in predictions.
constexpr double prior_weight = 8;

// Older predictions decay by this at each observed layer, so that about the last 200 count.
constexpr double calibration_decay = 0.995;

// A use a pass later is worth so much of one now.
constexpr float pass_discount = 0.95F;

// Tokens of a typical verification, for what a prompt's shares mean to one.
constexpr float verified_tokens = 4;

// Two buckets an octave, from this score up.
constexpr float lowest_score = 1.0F / 256;
constexpr float buckets_per_octave = 2;

}  // namespace

UseForecast::UseForecast(const SchedulerShape& shape)
    : shape_{shape},
      scores_(std::size_t{shape.layer_count} * shape.expert_count, 0.0F),
      frequency_(scores_.size(), std::min(1.0F, 2.0F * static_cast<float>(shape.experts_per_token) /
                                                    static_cast<float>(shape.expert_count))),
      state_(shape.layer_count, State::unknown),
      used_(shape.expert_count, 0) {
  for (std::uint16_t layer = 0; layer <= shape.layer_count; ++layer) {
    discounts_.push_back(
        std::pow(pass_discount, static_cast<float>(layer) / static_cast<float>(shape.layer_count)));
  }
  for (std::size_t i = 0; i < bucket_count; ++i) {
    Bucket& bucket = buckets_[i];
    bucket.score_from =
        i == 0 ? 0.0F : lowest_score * std::exp2(static_cast<float>(i) / buckets_per_octave);
    // Until it is measured: a router's selection comes true, a probability as often as it says.
    bucket.predictions = prior_weight;
    bucket.used = prior_weight * std::min(0.9F, bucket.score_from);
  }
}

std::size_t UseForecast::bucket_of(float score) {
  if (!(score > lowest_score)) return 0;
  // Sums of scores may be infinite, which no integer can hold.
  const float steps = buckets_per_octave * std::log2(score / lowest_score);
  return static_cast<std::size_t>(std::min(steps, static_cast<float>(bucket_count - 1)));
}

void UseForecast::predict(std::uint16_t layer, std::span<const float> scores) {
  if (state_.at(layer) == State::ran) return;  // too late for this iteration
  state_[layer] = State::ahead;
  float* joined = scores_.data() + place({layer, 0});
  for (std::size_t expert = 0; expert < scores.size(); ++expert) {
    if (scores[expert] > 0 && std::isfinite(scores[expert])) joined[expert] += scores[expert];
  }
}

void UseForecast::observe(std::uint16_t layer, std::span<const std::uint16_t> experts,
                          std::span<const std::uint32_t> rows, std::uint32_t tokens) {
  std::ranges::fill(used_, std::uint8_t{0});
  for (const std::uint16_t expert : experts) used_[expert] = 1;
  if (state_.at(layer) == State::ahead) {
    for (Bucket& bucket : buckets_) {
      bucket.predictions *= calibration_decay;
      bucket.used *= calibration_decay;
    }
    for (std::uint16_t expert = 0; expert < shape_.expert_count; ++expert) {
      Bucket& bucket = buckets_[bucket_of(scores_[place({layer, expert})])];
      bucket.predictions += 1;
      bucket.used += used_[expert];
    }
  }
  float* frequency = frequency_.data() + place({layer, 0});
  if (tokens > shape_.expert_count) {
    // Nearly every expert has a row in so many tokens: only their shares differ.
    std::fill_n(frequency, shape_.expert_count, 0.0F);
    for (std::size_t i = 0; i < experts.size(); ++i) {
      const float share = std::min(1.0F, static_cast<float>(rows[i]) / static_cast<float>(tokens));
      frequency[experts[i]] = 1 - std::pow(1 - share, verified_tokens);
    }
  } else {
    for (std::uint16_t expert = 0; expert < shape_.expert_count; ++expert) {
      frequency[expert] += frequency_step * (static_cast<float>(used_[expert]) - frequency[expert]);
    }
  }
  state_[layer] = State::ran;
}

void UseForecast::end_iteration() {
  std::ranges::fill(state_, State::unknown);
  std::ranges::fill(scores_, 0.0F);
}

float UseForecast::probability(ExpertId expert) const {
  if (state_[expert.layer] != State::ahead) return frequency_[place(expert)];
  const Bucket& bucket = buckets_[bucket_of(scores_[place(expert)])];
  return static_cast<float>(bucket.used / bucket.predictions);
}

float UseForecast::value(ExpertId expert, std::uint16_t current_layer) const {
  const int layers = shape_.layer_count;
  const int until = (expert.layer + layers - current_layer) % layers;
  const float away = discounts_[static_cast<std::size_t>(until)];
  const float first = probability(expert);
  const float later = frequency(expert);
  return away * (first + (1 - first) * discounts_.back() * later);
}

}  // namespace spmoe
