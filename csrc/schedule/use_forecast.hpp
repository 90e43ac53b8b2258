#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "base/types.hpp"

namespace spmoe {

/// Sizes of the model and of the device's pool.
struct SchedulerShape {
  std::uint16_t layer_count;
  std::uint16_t expert_count;  ///< in each layer
  SlotIndex slot_count;
  std::uint64_t blob_bytes;
  std::uint16_t experts_per_token = 1;  ///< the routers' top-k
};

/// How likely each expert is to be used when its layer next runs: from this iteration's
/// predictions, calibrated by what earlier ones came to, or else from how often it was used.
///
/// A layer is predicted from its first `predict` until it runs (`observe`) or the iteration ends.
/// After construction it allocates nothing. One thread.
class UseForecast {
 public:
  explicit UseForecast(const SchedulerShape& shape);

  /// Adds the scores of one or more tokens for `layer` [expert_count]: router probabilities, and 1
  /// more for each token whose router selects the expert; at most 1 where none does. Scores of
  /// several calls add up. A score that is not a finite number above 0 counts as 0.
  void predict(std::uint16_t layer, std::span<const float> scores);

  /// `layer` ran `experts`, `rows[i]` of its `tokens` rows through `experts[i]`.
  void observe(std::uint16_t layer, std::span<const std::uint16_t> experts,
               std::span<const std::uint32_t> rows, std::uint32_t tokens);

  /// The iteration is over: its predictions are spent.
  void end_iteration();

  /// Of being used when its layer next runs; in [0, 1].
  [[nodiscard]] float probability(ExpertId expert) const;

  /// The value of keeping the expert when `current_layer` is about to run: the chance of each use
  /// to come, discounted by how many passes away it is; in [0, 1].
  [[nodiscard]] float value(ExpertId expert, std::uint16_t current_layer) const;

  /// Share of the layer's recent runs that used the expert, a moving average.
  [[nodiscard]] float frequency(ExpertId expert) const { return frequency_[place(expert)]; }

  /// Whether predictions for the layer's coming run are there.
  [[nodiscard]] bool predicted(std::uint16_t layer) const { return state_[layer] == State::ahead; }

  /// Whether the layer has run in this iteration.
  [[nodiscard]] bool ran(std::uint16_t layer) const { return state_[layer] == State::ran; }

  /// One step of the calibration: predictions of about the same score.
  struct Bucket {
    float score_from;        ///< the next bucket's is where it ends
    double predictions = 0;  ///< weight of predictions; older ones weigh less
    double used = 0;         ///< of these, the expert was used
  };
  [[nodiscard]] std::span<const Bucket> calibration() const noexcept { return buckets_; }

 private:
  enum class State : std::uint8_t { unknown, ahead, ran };

  [[nodiscard]] std::size_t place(ExpertId expert) const {
    return std::size_t{expert.layer} * shape_.expert_count + expert.expert;
  }
  [[nodiscard]] static std::size_t bucket_of(float score);

  static constexpr std::size_t bucket_count = 24;
  SchedulerShape shape_;
  std::vector<float> scores_;       // [layer, expert], joined
  std::vector<float> frequency_;    // [layer, expert]
  std::vector<State> state_;        // by layer
  std::vector<std::uint8_t> used_;  // by expert, of the run being observed
  std::array<Bucket, bucket_count> buckets_;
  std::vector<float> discounts_;  // by layers until a use; the last is a whole pass
};

}  // namespace spmoe
