#include "schedule/use_forecast.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "allocation_counter.hpp"

namespace spmoe {
namespace {

using Experts = std::vector<std::uint16_t>;
using Scores = std::vector<float>;

constexpr std::uint16_t layer_count = 4;
constexpr std::uint16_t expert_count = 8;
constexpr SchedulerShape shape{layer_count, expert_count, /*slot_count=*/4, /*blob_bytes=*/1,
                               /*experts_per_token=*/2};

/// A verification of one row for each of `experts`.
void observe(UseForecast& forecast, std::uint16_t layer, const Experts& experts) {
  const std::vector<std::uint32_t> rows(experts.size(), 1);
  forecast.observe(layer, experts, rows, /*tokens=*/4);
}

/// The scores of a router that selects `selected`.
Scores selecting(const Experts& selected) {
  Scores scores(expert_count, 0.02F);
  for (const std::uint16_t expert : selected) scores[expert] = 1.4F;
  return scores;
}

TEST(UseForecast, expects_of_an_unknown_expert_what_two_tokens_choose_at_random) {
  const UseForecast forecast{shape};
  for (std::uint16_t expert = 0; expert < expert_count; ++expert) {
    EXPECT_FLOAT_EQ(forecast.frequency({1, expert}), 0.5F);
    EXPECT_FLOAT_EQ(forecast.probability({1, expert}), 0.5F);
  }
  const UseForecast dense{{1, 2, 1, 1, /*experts_per_token=*/2}};
  EXPECT_FLOAT_EQ(dense.frequency({0, 0}), 1.0F);
}

TEST(UseForecast, a_layer_is_predicted_until_it_runs_or_the_iteration_ends) {
  UseForecast forecast{shape};
  EXPECT_FALSE(forecast.predicted(1));
  forecast.predict(1, selecting({0}));
  forecast.predict(2, selecting({0}));
  EXPECT_TRUE(forecast.predicted(1));
  EXPECT_FALSE(forecast.predicted(0));
  observe(forecast, 1, {0});
  EXPECT_FALSE(forecast.predicted(1));
  EXPECT_TRUE(forecast.ran(1));
  EXPECT_TRUE(forecast.predicted(2));
  forecast.end_iteration();
  for (const std::uint16_t layer : Experts{1, 2}) {
    EXPECT_FALSE(forecast.predicted(layer));
    EXPECT_FALSE(forecast.ran(layer));
    forecast.predict(layer, Scores(expert_count, 0.0F));
    EXPECT_EQ(forecast.probability({layer, 0}), 0.0F);  // nothing is left of the scores before
  }
}

TEST(UseForecast, a_prediction_for_a_layer_that_ran_already_is_ignored) {
  UseForecast forecast{shape};
  observe(forecast, 1, {0});
  forecast.predict(1, selecting({3}));
  EXPECT_FALSE(forecast.predicted(1));
  EXPECT_FLOAT_EQ(forecast.probability({1, 3}), forecast.frequency({1, 3}));
}

TEST(UseForecast, scores_of_several_tokens_add_up) {
  UseForecast forecast{shape};
  forecast.predict(1, Scores{0.25F, 1.5F, 0, 0, 0, 0, 0, 0});
  forecast.predict(1, Scores{0.5F, 0, 0, 0, 0, 0, 0, 0});
  UseForecast at_once{shape};
  at_once.predict(1, Scores{0.75F, 1.5F, 0, 0, 0, 0, 0, 0});
  UseForecast one_token{shape};
  one_token.predict(1, Scores{0.5F, 0, 0, 0, 0, 0, 0, 0});
  EXPECT_EQ(forecast.probability({1, 0}), at_once.probability({1, 0}));
  EXPECT_EQ(forecast.probability({1, 1}), at_once.probability({1, 1}));
  EXPECT_GT(forecast.probability({1, 0}), one_token.probability({1, 0}));
  EXPECT_FALSE(forecast.predicted(0));
}

TEST(UseForecast, a_selected_expert_is_likelier_than_a_probable_one_and_that_than_the_others) {
  UseForecast forecast{shape};
  forecast.predict(0, Scores{1.5F, 0.3F, 0.0F, 0, 0, 0, 0, 0});
  EXPECT_GT(forecast.probability({0, 0}), 0.8F);
  EXPECT_NEAR(forecast.probability({0, 1}), 0.3F, 0.1F);
  EXPECT_EQ(forecast.probability({0, 2}), 0.0F);
}

TEST(UseForecast, what_is_not_a_finite_number_above_0_counts_as_0) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  UseForecast forecast{shape};
  forecast.predict(0, Scores{std::nanf(""), infinity, -infinity, -1.0F, 0.0F, -0.0F, 0.5F, 0.5F});
  for (std::uint16_t expert = 0; expert < 6; ++expert) {
    EXPECT_EQ(forecast.probability({0, expert}), 0.0F) << expert;
  }
  EXPECT_NEAR(forecast.probability({0, 6}), 0.5F, 0.1F);
}

TEST(UseForecast, a_sum_of_scores_that_overflows_is_as_likely_as_the_highest) {
  UseForecast forecast{shape};
  const Scores huge(expert_count, std::numeric_limits<float>::max());
  for (int token = 0; token < 3; ++token) forecast.predict(0, huge);
  EXPECT_NEAR(forecast.probability({0, 0}), 0.9F, 1e-6F);
  observe(forecast, 0, {0});
  EXPECT_GT(forecast.calibration().back().predictions, 8.0);
}

TEST(UseForecast, experts_that_are_used_again_and_again_become_frequent_and_others_rare) {
  UseForecast forecast{shape};
  float rising = forecast.frequency({2, 5});
  float falling = forecast.frequency({2, 6});
  for (int pass = 0; pass < 60; ++pass) {
    observe(forecast, 2, {5});
    forecast.end_iteration();
    EXPECT_GT(forecast.frequency({2, 5}), rising);
    EXPECT_LT(forecast.frequency({2, 6}), falling);
    rising = forecast.frequency({2, 5});
    falling = forecast.frequency({2, 6});
  }
  EXPECT_GT(rising, 0.95F);
  EXPECT_LT(falling, 0.05F);
  EXPECT_FLOAT_EQ(forecast.frequency({1, 5}), 0.5F);  // of another layer
}

TEST(UseForecast, a_good_predictor_is_believed_more_and_more) {
  UseForecast forecast{shape};
  const auto believed = [&] {
    forecast.predict(3, selecting({1, 4}));
    const float probability = forecast.probability({3, 1});
    forecast.end_iteration();
    return probability;
  };
  const float before = believed();
  for (int pass = 0; pass < 100; ++pass) {
    forecast.predict(0, selecting({2, 7}));  // what one layer shows holds for the others
    observe(forecast, 0, {2, 7});
    forecast.end_iteration();
  }
  EXPECT_GT(believed(), before);
  EXPECT_GT(believed(), 0.97F);
}

TEST(UseForecast, a_predictor_that_is_wrong_everywhere_is_not_believed_any_more) {
  UseForecast forecast{shape};
  for (int pass = 0; pass < 400; ++pass) {
    forecast.predict(0, selecting({2, 7}));
    observe(forecast, 0, {0, 1, 3, 4, 5, 6});
    forecast.end_iteration();
  }
  forecast.predict(0, selecting({2, 7}));
  EXPECT_LT(forecast.probability({0, 2}), 0.05F);
  EXPECT_GT(forecast.probability({0, 0}), 0.95F);
}

TEST(UseForecast, calibration_moves_from_one_regime_to_the_next) {
  UseForecast forecast{shape};
  for (int pass = 0; pass < 1000; ++pass) {
    forecast.predict(0, selecting({2}));
    observe(forecast, 0, {2});
    forecast.end_iteration();
  }
  for (int pass = 0; pass < 1000; ++pass) {
    forecast.predict(0, selecting({2}));
    observe(forecast, 0, {3});
    forecast.end_iteration();
  }
  forecast.predict(0, selecting({2}));
  EXPECT_LT(forecast.probability({0, 2}), 0.05F);
}

TEST(UseForecast, a_run_that_was_not_predicted_leaves_the_calibration_alone) {
  UseForecast forecast{shape};
  std::vector<double> before;
  for (const auto& bucket : forecast.calibration()) before.push_back(bucket.predictions);
  observe(forecast, 0, {1, 2});
  forecast.predict(1, selecting({0}));
  forecast.end_iteration();  // all drafts were rejected before layer 1 ran
  observe(forecast, 1, {5});
  std::size_t i = 0;
  for (const auto& bucket : forecast.calibration()) {
    EXPECT_EQ(bucket.predictions, before[i++]);
    EXPECT_LE(bucket.used, bucket.predictions);
  }
}

TEST(UseForecast, buckets_ascend_and_a_score_counts_in_the_one_it_falls_into) {
  UseForecast forecast{shape};
  const auto buckets = forecast.calibration();
  for (std::size_t i = 1; i < buckets.size(); ++i) {
    EXPECT_LT(buckets[i - 1].score_from, buckets[i].score_from);
  }
  for (std::size_t i = 0; i + 1 < buckets.size(); ++i) {
    const float inside = (buckets[i].score_from + buckets[i + 1].score_from) / 2;
    const double before = buckets[i].predictions;
    forecast.predict(0, Scores(expert_count, inside));
    observe(forecast, 0, {});
    EXPECT_NEAR(buckets[i].predictions, 0.995 * before + expert_count, 1e-9) << "bucket " << i;
    forecast.end_iteration();
  }
}

TEST(UseForecast, a_prompt_sets_frequencies_from_the_shares_of_its_rows) {
  UseForecast forecast{shape};
  forecast.observe(1, Experts{0, 1, 2}, std::vector<std::uint32_t>{100, 50, 1}, /*tokens=*/100);
  EXPECT_FLOAT_EQ(forecast.frequency({1, 0}), 1.0F);
  EXPECT_NEAR(forecast.frequency({1, 1}), 15.0F / 16, 1e-6F);  // some of 4 tokens, each by half
  EXPECT_NEAR(forecast.frequency({1, 2}), 1 - std::pow(0.99F, 4.0F), 1e-6F);
  EXPECT_EQ(forecast.frequency({1, 3}), 0.0F);
  EXPECT_FLOAT_EQ(forecast.frequency({0, 3}), 0.5F);
}

TEST(UseForecast, a_token_that_chooses_an_expert_twice_makes_it_no_likelier_than_certain) {
  UseForecast forecast{shape};
  forecast.observe(0, Experts{0}, std::vector<std::uint32_t>{300}, /*tokens=*/100);
  EXPECT_FLOAT_EQ(forecast.frequency({0, 0}), 1.0F);
}

TEST(UseForecast, a_nearer_use_is_worth_more) {
  const UseForecast forecast{shape};
  for (std::uint16_t current = 0; current < layer_count; ++current) {
    for (std::uint16_t ahead = 1; ahead < layer_count; ++ahead) {
      const auto nearer = static_cast<std::uint16_t>((current + ahead - 1) % layer_count);
      const auto further = static_cast<std::uint16_t>((current + ahead) % layer_count);
      EXPECT_GT(forecast.value({nearer, 0}, current), forecast.value({further, 0}, current));
    }
  }
}

TEST(UseForecast, what_is_frequent_but_not_predicted_is_worth_more_than_what_is_never_used) {
  UseForecast forecast{shape};
  for (int pass = 0; pass < 20; ++pass) {
    observe(forecast, 1, {0});
    forecast.end_iteration();
  }
  forecast.predict(1, Scores{0, 0, 1.5F, 0, 0, 0, 0, 0});
  EXPECT_EQ(forecast.probability({1, 0}), forecast.probability({1, 1}));
  EXPECT_GT(forecast.value({1, 0}, 0), forecast.value({1, 1}, 0) + 0.5F);
  EXPECT_GT(forecast.value({1, 2}, 0), forecast.value({1, 1}, 0) + 0.5F);
}

TEST(UseForecast, values_and_probabilities_stay_between_0_and_1) {
  UseForecast forecast{shape};
  const Scores whole(expert_count, 100.0F);
  for (int pass = 0; pass < 300; ++pass) {
    for (std::uint16_t layer = 0; layer < layer_count; ++layer) {
      if (pass % 3 != 0) forecast.predict(layer, whole);
      observe(forecast, layer, {0, 1, 2, 3, 4, 5, 6, 7});
    }
    forecast.end_iteration();
  }
  forecast.predict(0, whole);
  for (const std::uint16_t layer : Experts{0, 1}) {
    EXPECT_LE(forecast.probability({layer, 0}), 1.0F);
    EXPECT_LE(forecast.value({layer, 0}, layer), 1.0F);
    EXPECT_GT(forecast.value({layer, 0}, layer), 0.95F);
  }
}

TEST(UseForecast, allocates_nothing_after_construction) {
  UseForecast forecast{shape};
  const Scores scores = selecting({1, 2});
  const Experts experts{1, 3};
  const std::array<std::uint32_t, 2> rows{1, 2};
  const std::size_t before = allocation_count();
  for (const std::uint32_t tokens : {3U, 100U}) {
    forecast.predict(1, scores);
    forecast.observe(1, experts, rows, tokens);
    static_cast<void>(forecast.value({1, 3}, 0));
    forecast.end_iteration();
  }
  EXPECT_EQ(allocation_count() - before, 0u);
}

}  // namespace
}  // namespace spmoe
