#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "scheduler_driver.hpp"

namespace spmoe {
namespace {

using To = FillChange::To;

/// All changes that are to be reported.
std::vector<std::pair<SlotIndex, To>> changes(Scheduler& scheduler) {
  std::vector<std::pair<SlotIndex, To>> reported;
  while (const auto change = scheduler.fills().next_change())
    reported.emplace_back(change->slot, change->to);
  return reported;
}

/// Reads layer 1 ahead, all four of its experts being in flight, then needs expert 2 alone.
struct Cancelled {
  Cancelled() {
    run(scheduler, 0, all_of(4));
    fills = start(scheduler);
    scheduler.access(1, Experts{2});
  }
  Scheduler scheduler = make(3, 4, 8);
  std::vector<Fill> fills;  // by expert
};

TEST(Scheduler, an_access_cancels_the_prefetches_in_flight_that_it_does_not_want) {
  Cancelled it;
  ASSERT_EQ(it.fills.size(), 4u);
  auto reported = changes(it.scheduler);
  std::ranges::sort(reported);
  std::vector<std::pair<SlotIndex, To>> expected;
  for (const Fill& fill : it.fills) {
    expected.emplace_back(fill.slot, fill.expert.expert == 2 ? To::promoted : To::cancelled);
  }
  EXPECT_EQ(reported, expected);
  EXPECT_EQ(it.scheduler.fills().stats()[1].late, 1u);
  it.scheduler.progress(it.fills[2].slot, FillOutcome::arrived);
  EXPECT_EQ(take(it.scheduler), Experts{2});
  it.scheduler.computed(2);
  it.scheduler.progress(it.fills[0].slot, FillOutcome::cancelled, 0);
  it.scheduler.progress(it.fills[1].slot, FillOutcome::cancelled, 300);
  it.scheduler.progress(it.fills[3].slot, FillOutcome::arrived);  // too late
  EXPECT_EQ(it.scheduler.fills().resident_count(), 6u);
  const LayerStats& stats = it.scheduler.fills().stats()[1];
  EXPECT_EQ(stats.prefetch_bytes, 2 * blob_bytes + 300);
  EXPECT_EQ(stats.prefetch_used_bytes, blob_bytes);
  EXPECT_EQ(stats.cancelled_bytes, 2 * blob_bytes - 300);
  EXPECT_EQ(stats.cancelled, 0u);  // all had started
  EXPECT_EQ(run(it.scheduler, 1, all_of(4)), 2u);
  EXPECT_EQ(changes(it.scheduler).size(), 0u);
}

TEST(Scheduler, a_cancelled_expert_that_is_needed_is_read_again_once_its_end_is_reported) {
  Cancelled it;
  it.scheduler.abandon_access();
  static_cast<void>(changes(it.scheduler));
  it.scheduler.access(1, Experts{0, 1, 3});
  EXPECT_EQ(it.scheduler.fills().stats()[1].misses, 3u);
  EXPECT_FALSE(it.scheduler.next_fill());
  EXPECT_EQ(take(it.scheduler), Experts{});
  it.scheduler.progress(it.fills[1].slot, FillOutcome::cancelled, 999);
  const auto again = start(it.scheduler);
  ASSERT_EQ(again.size(), 1u);
  EXPECT_EQ(again[0].expert, (ExpertId{1, 1}));
  EXPECT_EQ(again[0].kind, FillKind::demand);
  EXPECT_EQ(it.scheduler.progress(it.fills[0].slot, FillOutcome::failed, 10),
            FailureScope::nothing);  // not this need's read
  EXPECT_EQ(start(it.scheduler).size(), 1u);
  it.scheduler.progress(it.fills[3].slot, FillOutcome::arrived);  // whole all the same
  EXPECT_EQ(take(it.scheduler), Experts{3});
  it.scheduler.progress(again[0].slot, FillOutcome::arrived);
  EXPECT_EQ(take(it.scheduler), Experts{1});
  EXPECT_FALSE(it.scheduler.next_fill());
  EXPECT_EQ(it.scheduler.fills().stats()[1].prefetch_bytes, 999u + 10 + blob_bytes);
  EXPECT_EQ(it.scheduler.fills().stats()[1].prefetch_used_bytes, blob_bytes);
  EXPECT_EQ(it.scheduler.fills().stats()[1].demand_bytes, blob_bytes);
}

TEST(Scheduler, no_prefetch_passes_a_demand_that_waits_for_the_end_of_a_cancelled_fill) {
  Cancelled it;
  it.scheduler.abandon_access();
  it.scheduler.access(1, all_of(4));  // reads layer 2 ahead
  EXPECT_FALSE(it.scheduler.next_fill());
  for (const std::size_t expert : {0U, 1U, 3U}) {
    it.scheduler.progress(it.fills[expert].slot, FillOutcome::cancelled, 0);
    EXPECT_EQ(it.scheduler.next_fill().value().kind, FillKind::demand);
  }
  EXPECT_EQ(it.scheduler.next_fill().value().expert.layer, 2);
}

TEST(Scheduler, a_prefetch_that_is_asked_for_again_waits_for_the_end_of_the_cancelled_one) {
  Scheduler scheduler{{2, 4, 8, blob_bytes, 1}, {"sp-moe", "auto"}};
  const std::vector<float> scores{0, 1.5F, 0, 0};
  scheduler.predict(1, scores);
  const auto first = scheduler.next_fill().value();
  scheduler.end_iteration();
  EXPECT_EQ(changes(scheduler), (std::vector{std::pair{first.slot, To::cancelled}}));
  scheduler.predict(1, scores);
  EXPECT_FALSE(scheduler.next_fill());
  scheduler.progress(first.slot, FillOutcome::cancelled, 1);
  EXPECT_EQ(scheduler.next_fill().value().expert, (ExpertId{1, 1}));
}

TEST(Scheduler, the_end_of_an_iteration_cancels_what_was_drafted_for_layers_that_did_not_run) {
  for (const bool early : {false, true}) {
    Scheduler scheduler{{3, 4, 8, blob_bytes, 2}, {"sp-moe", "auto"}};
    const std::vector<float> scores{1.5F, 1.5F, 0, 0};
    for (std::uint16_t layer = 0; layer < 3; ++layer) scheduler.predict(layer, scores);
    const auto fills = start(scheduler);
    ASSERT_EQ(fills.size(), 6u);
    scheduler.progress(fills[4].slot, FillOutcome::arrived);
    scheduler.access(0, Experts{0, 1});
    EXPECT_EQ(changes(scheduler).size(), 2u);  // are promoted
    // A request that ended early leaves its iteration to the next one.
    early ? scheduler.begin_request() : scheduler.end_iteration();
    EXPECT_EQ(changes(scheduler), (std::vector{std::pair{fills[2].slot, To::cancelled},
                                               std::pair{fills[3].slot, To::cancelled},
                                               std::pair{fills[5].slot, To::cancelled}}));
    scheduler.begin_request();
    scheduler.end_iteration();
    EXPECT_EQ(changes(scheduler).size(), 0u);
  }
}

TEST(Scheduler, the_next_request_starts_with_no_layer_run) {
  Scheduler scheduler{{2, 4, 8, blob_bytes, 1}, {"sp-moe", "auto"}};
  run(scheduler, 1, {0});
  scheduler.begin_request();  // the request ended in the middle of its first pass
  scheduler.predict(1, std::vector<float>{0, 1.5F, 0, 0});
  EXPECT_EQ(scheduler.next_fill().value().expert, (ExpertId{1, 1}));
}

TEST(Scheduler, what_the_running_need_waits_for_is_never_cancelled) {
  Scheduler scheduler{{1, 4, 4, blob_bytes, 1}, {"sp-moe", "auto"}};
  const std::vector<float> scores{0, 1.5F, 0, 0};
  scheduler.predict(0, scores);
  const auto fill = scheduler.next_fill().value();
  scheduler.access(0, Experts{1});
  EXPECT_EQ(changes(scheduler), (std::vector{std::pair{fill.slot, To::promoted}}));
  // Another thread ends iterations and predicts meanwhile.
  scheduler.end_iteration();
  scheduler.predict(0, scores);
  EXPECT_FALSE(scheduler.next_fill());
  scheduler.end_iteration();
  EXPECT_EQ(changes(scheduler).size(), 0u);
  scheduler.progress(fill.slot, FillOutcome::arrived);
  EXPECT_EQ(take(scheduler), Experts{1});
}

TEST(Scheduler, horizon_finishes_what_is_often_used) {
  Scheduler scheduler{{2, 4, 8, blob_bytes, 1}, {"horizon", "auto"}};
  for (int pass = 0; pass < 40; ++pass) {
    scheduler.access(1, Experts{0});
    EXPECT_EQ(scheduler.progress(scheduler.next_fill().value().slot, FillOutcome::failed, 0),
              FailureScope::access);  // never resident
    scheduler.abandon_access();
    scheduler.end_iteration();
  }
  scheduler.predict(1, std::vector<float>{1.5F, 1.5F, 0, 0});
  const auto fills = start(scheduler);
  ASSERT_EQ(fills.size(), 2u);
  EXPECT_EQ(fills[1].expert, (ExpertId{1, 1}));
  scheduler.access(1, Experts{2});
  EXPECT_EQ(changes(scheduler), (std::vector{std::pair{fills[1].slot, To::cancelled}}));
}

TEST(Scheduler, a_failed_fill_accounts_for_what_it_moved) {
  Scheduler scheduler = make(2, 4, 4);
  scheduler.access(0, Experts{0});
  EXPECT_EQ(scheduler.progress(scheduler.next_fill().value().slot, FillOutcome::failed, 700),
            FailureScope::access);
  scheduler.abandon_access();
  EXPECT_EQ(scheduler.fills().stats()[0].demand_bytes, 700u);
  run(scheduler, 0, all_of(4));
  EXPECT_EQ(scheduler.progress(scheduler.next_fill().value().slot, FillOutcome::failed, 20),
            FailureScope::nothing);
  EXPECT_EQ(scheduler.fills().stats()[1].prefetch_bytes, 20u);
  EXPECT_EQ(scheduler.fills().stats()[1].prefetch_used_bytes, 0u);
}

}  // namespace
}  // namespace spmoe
