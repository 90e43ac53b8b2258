#include "device/copy/held_movers.hpp"

#include <gtest/gtest.h>

#include <chrono>
#include <utility>
#include <vector>

#include "device/copy/faulty_movers.hpp"
#include "device/copy/paced_movers.hpp"

namespace spmoe {
namespace {

using namespace std::chrono_literals;
using Clock = HeldMovers::Clock;

// Every case of the adaptors at clocks of different origins: a steady clock may begin anywhere.
class HeldMoversFrom : public ::testing::TestWithParam<std::pair<const char*, Clock::time_point>> {
 protected:
  const Clock::time_point start = GetParam().second;
};

INSTANTIATE_TEST_SUITE_P(origin, HeldMoversFrom,
                         ::testing::Values(std::pair{"an_hour_before_zero", Clock::time_point{-1h}},
                                           std::pair{"zero", Clock::time_point{}},
                                           std::pair{"an_hour_after_zero", Clock::time_point{1h}},
                                           std::pair{"near_the_end",
                                                     Clock::time_point::max() - 24h}),
                         [](const auto& test) { return test.param.first; });

TEST_P(HeldMoversFrom, lay_the_chunks_behind_each_other_on_a_paced_link) {
  PacedMovers movers{nullptr, 1.0};
  EXPECT_EQ(movers.admit(1'000'000'000, start, start).until, start + 1s);
  EXPECT_EQ(movers.admit(500'000'000, start, start).until, start + 1500ms);
  EXPECT_EQ(movers.admit(2'000'000'000, start + 1s, start + 1s).until, start + 3500ms);
}

TEST_P(HeldMoversFrom, a_paced_link_that_was_free_begins_when_the_copy_was_submitted) {
  PacedMovers movers{nullptr, 1.0};
  const auto now = start + 1h;  // a thread gets to it an hour late
  EXPECT_EQ(movers.admit(1'000'000'000, start, now).until, start + 1s);
  EXPECT_EQ(movers.admit(1'000'000'000, start + 10s, now).until, start + 11s);
}

TEST_P(HeldMoversFrom, hold_nobody_without_a_planted_delay) {
  FaultPlan plan;
  for (int i = 0; i < 3; ++i) EXPECT_EQ(plan.admit(start).until, HeldMovers::at_once);
}

TEST_P(HeldMoversFrom, planted_delays_count_from_now) {
  FaultPlan plan{{.delay_seed = 1, .max_delay_us = 1000}};
  const auto until = plan.admit(start + 1h).until;
  EXPECT_GE(until, start + 1h);
  EXPECT_LE(until, start + 1h + 1ms);
}

TEST_P(HeldMoversFrom, planted_delays_are_the_same_for_the_same_seed) {
  const auto delays = [this](std::uint32_t seed) {
    FaultPlan plan{{.delay_seed = seed, .max_delay_us = 1000}};
    std::vector<Clock::duration> result;
    for (int i = 0; i < 20; ++i) result.push_back(plan.admit(start).until - start);
    return result;
  };
  EXPECT_EQ(delays(1), delays(1));
  EXPECT_NE(delays(1), delays(2));
}

TEST(FaultPlan, fails_the_nth_chunk_once) {
  FaultPlan plan{{.fail_at_chunk = 2}};
  const auto fails = [&] { return plan.admit({}).fail; };
  EXPECT_FALSE(fails());
  EXPECT_TRUE(fails());
  EXPECT_FALSE(fails());
  plan.plant({.fail_at_chunk = 1});
  EXPECT_TRUE(fails());
  EXPECT_FALSE(fails());
}

}  // namespace
}  // namespace spmoe
