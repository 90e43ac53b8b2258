#include "schedule/activation_history.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "allocation_counter.hpp"

namespace spmoe {
namespace {

using Experts = std::vector<std::uint16_t>;
using Rows = std::vector<std::uint32_t>;

constexpr SchedulerShape shape{/*layer_count=*/3, /*expert_count=*/6, /*slot_count=*/4,
                               /*blob_bytes=*/1};

/// A whole request: each layer runs `experts`, one row each. It is the past afterwards.
void request(ActivationHistory& history, const Experts& experts) {
  for (std::uint16_t layer = 0; layer < shape.layer_count; ++layer) {
    history.observe(layer, experts, Rows(experts.size(), 1));
  }
  history.begin_request();
}

TEST(ActivationHistory, knows_nothing_before_there_is_a_past_request_and_a_layer_ran) {
  ActivationHistory history{shape};
  history.observe(0, Experts{1}, Rows{1});
  EXPECT_EQ(history.share({0, 1}), 0.0F);  // the request in flight is not its own past
  history.begin_request();
  EXPECT_EQ(history.share({0, 1}), 0.0F);
  history.observe(0, Experts{1}, Rows{1});
  EXPECT_EQ(history.share({0, 1}), 1.0F);
}

TEST(ActivationHistory, share_is_the_expert_s_part_of_its_layer_s_rows) {
  ActivationHistory history{shape};
  history.observe(0, Experts{0, 5}, Rows{3, 1});
  history.observe(2, Experts{2}, Rows{7});
  history.begin_request();
  history.observe(0, Experts{0}, Rows{1});
  EXPECT_FLOAT_EQ(history.share({0, 0}), 0.75F);
  EXPECT_FLOAT_EQ(history.share({0, 5}), 0.25F);
  EXPECT_FLOAT_EQ(history.share({2, 2}), 1.0F);
  EXPECT_EQ(history.share({1, 2}), 0.0F);  // that layer did not run
}

TEST(ActivationHistory, the_nearest_request_changes_with_what_the_running_one_does) {
  ActivationHistory history{shape};
  request(history, {0, 1});
  request(history, {4, 5});
  history.observe(0, Experts{0}, Rows{1});
  EXPECT_FLOAT_EQ(history.share({2, 1}), 0.5F);
  EXPECT_EQ(history.share({2, 4}), 0.0F);
  history.observe(1, Experts{4, 5}, Rows{2, 2});
  EXPECT_EQ(history.share({2, 1}), 0.0F);
  EXPECT_FLOAT_EQ(history.share({2, 4}), 0.5F);
}

TEST(ActivationHistory, a_long_request_is_no_nearer_for_its_length) {
  ActivationHistory history{shape};
  history.observe(0, Experts{0, 1, 2}, Rows{100, 100, 100});
  history.begin_request();
  history.observe(0, Experts{0}, Rows{1});
  history.begin_request();
  history.observe(0, Experts{0}, Rows{1});
  EXPECT_FLOAT_EQ(history.share({0, 0}), 1.0F);
}

TEST(ActivationHistory, a_request_in_which_nothing_ran_leaves_no_past) {
  ActivationHistory history{shape};
  request(history, {3});
  for (int i = 0; i < 100; ++i) history.begin_request();
  history.observe(0, Experts{3}, Rows{1});
  EXPECT_EQ(history.share({1, 3}), 1.0F);
}

TEST(ActivationHistory, forgets_the_oldest_requests) {
  ActivationHistory history{shape};
  request(history, {5});
  for (int i = 0; i < 32; ++i) request(history, {0});
  history.observe(0, Experts{5}, Rows{1});
  EXPECT_EQ(history.share({1, 5}), 0.0F);
}

TEST(ActivationHistory, allocates_nothing_after_construction) {
  ActivationHistory history{shape};
  const Experts experts{1, 2};
  const Rows rows{1, 3};
  const std::size_t before = allocation_count();
  for (int i = 0; i < 40; ++i) {
    history.observe(1, experts, rows);
    static_cast<void>(history.share({1, 2}));
    history.begin_request();
  }
  EXPECT_EQ(allocation_count() - before, 0u);
}

}  // namespace
}  // namespace spmoe
