#include "schedule/prediction_stats.hpp"

#include <gtest/gtest.h>

#include <vector>

#include "allocation_counter.hpp"

namespace spmoe {
namespace {

using Experts = std::vector<std::uint16_t>;

constexpr SchedulerShape shape{/*layer_count=*/2, /*expert_count=*/6, /*slot_count=*/3,
                               /*blob_bytes=*/100, /*experts_per_token=*/2};

TEST(PredictionStats, counts_needs_among_the_top_k_and_the_top_2k) {
  PredictionStats stats{shape};
  LayerStats counted;
  stats.predict(0, std::vector{0.5F, 0.4F, 0.3F, 0.2F, 0.1F, 0.0F});
  stats.observe(0, Experts{0, 2, 5}, /*predicted=*/true, counted);
  EXPECT_EQ(counted.predicted_accesses, 3u);
  EXPECT_EQ(counted.recalled, 1u);
  EXPECT_EQ(counted.recalled_2k, 2u);
  EXPECT_EQ(counted.critical, 2u);
}

TEST(PredictionStats, predictions_are_spent_by_a_run_and_by_the_end_of_an_iteration) {
  PredictionStats stats{shape};
  const std::vector scores{0.5F, 0.4F, 0.0F, 0.0F, 0.0F, 0.0F};
  LayerStats counted;
  stats.predict(0, scores);
  stats.observe(0, Experts{0}, true, counted);
  stats.predict(1, scores);
  stats.end_iteration();
  for (const std::uint16_t layer : Experts{0, 1}) stats.observe(layer, Experts{0}, true, counted);
  EXPECT_EQ(counted.recalled, 1u);
  EXPECT_EQ(counted.critical, 2u);
}

TEST(PredictionStats, a_run_that_was_not_predicted_counts_repetition_alone) {
  PredictionStats stats{shape};
  LayerStats counted;
  const std::size_t before = allocation_count();
  const Experts first{0, 1};
  const Experts second{1, 2};
  const std::size_t own = allocation_count() - before;
  stats.observe(0, first, false, counted);
  EXPECT_EQ(counted.repeated, 0u);
  stats.observe(0, second, false, counted);
  EXPECT_EQ(counted.repeated, 1u);
  stats.observe(1, first, false, counted);
  EXPECT_EQ(counted.repeated, 1u);
  EXPECT_EQ(counted.predicted_accesses, 0u);
  EXPECT_EQ(allocation_count() - before, own) << "it allocates nothing";
}

}  // namespace
}  // namespace spmoe
