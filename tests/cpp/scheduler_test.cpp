#include "schedule/scheduler.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <set>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "allocation_counter.hpp"
#include "base/error.hpp"
#include "message_of.hpp"
#include "policy_world.hpp"

namespace spmoe {
namespace {

constexpr std::uint64_t blob_bytes = 1000;

using Experts = std::vector<std::uint16_t>;

Experts all_of(std::uint16_t expert_count) {
  Experts experts(expert_count);
  std::iota(experts.begin(), experts.end(), std::uint16_t{0});
  return experts;
}

LayerStats total(const Scheduler& scheduler) {
  LayerStats sum;
  for (const LayerStats& layer : scheduler.stats()) sum += layer;
  return sum;
}

Scheduler make(std::uint16_t layer_count, std::uint16_t expert_count, SlotIndex slot_count) {
  return Scheduler{{layer_count, expert_count, slot_count, blob_bytes}};
}

/// Starts every fill that may start now, of at least that kind.
std::vector<Fill> start(Scheduler& scheduler, FillKind at_least = FillKind::prefetch) {
  std::vector<Fill> fills;
  while (const auto fill = scheduler.next_fill(at_least)) fills.push_back(*fill);
  return fills;
}

Experts take(Scheduler& scheduler) {
  std::vector<ReadyExpert> ready;
  scheduler.take_ready(ready);
  Experts experts;
  for (const ReadyExpert& each : ready) experts.push_back(each.expert);
  return experts;
}

/// Runs a need to its end, every fill landing at once. Returns how many fills there were.
std::size_t run(Scheduler& scheduler, std::uint16_t layer, const Experts& experts) {
  scheduler.need(layer, experts);
  std::size_t fills = 0;
  for (std::size_t computed = 0; computed < experts.size();) {
    const auto fill = scheduler.next_fill(FillKind::demand);
    if (fill) {
      scheduler.filled(fill->slot);
      ++fills;
    }
    const Experts ready = take(scheduler);
    if (!fill && ready.empty()) {
      ADD_FAILURE() << "the need of layer " << layer << " is stuck";
      break;
    }
    for (const std::uint16_t expert : ready) scheduler.computed(expert);
    computed += ready.size();
  }
  return fills;
}

/// Fills of prefetches that may start now land at once. Returns their experts.
std::vector<ExpertId> land_prefetches(Scheduler& scheduler) {
  std::vector<ExpertId> experts;
  while (const auto fill = scheduler.next_fill()) {
    scheduler.filled(fill->slot);
    experts.push_back(fill->expert);
  }
  return experts;
}

TEST(Scheduler, a_miss_becomes_a_demand_and_is_ready_when_it_has_landed) {
  Scheduler scheduler = make(2, 4, 2);
  scheduler.need(1, Experts{3});
  const auto fill = scheduler.next_fill();
  ASSERT_TRUE(fill);
  EXPECT_EQ(fill->expert, (ExpertId{1, 3}));
  EXPECT_EQ(fill->kind, FillKind::demand);
  EXPECT_EQ(take(scheduler), Experts{});
  EXPECT_EQ(scheduler.resident_count(), 0u);
  scheduler.filled(fill->slot);
  std::vector<ReadyExpert> ready;
  scheduler.take_ready(ready);
  ASSERT_EQ(ready.size(), 1u);
  EXPECT_EQ(ready[0].expert, 3);
  EXPECT_EQ(ready[0].slot, fill->slot);
  EXPECT_EQ(scheduler.resident_count(), 1u);
  scheduler.computed(3);
}

TEST(Scheduler, ready_experts_come_in_the_order_in_which_they_landed) {
  Scheduler scheduler = make(1, 4, 4);
  run(scheduler, 0, {2});
  scheduler.need(0, Experts{0, 1, 2, 3});
  const auto fills = start(scheduler);
  ASSERT_EQ(fills.size(), 3u);
  for (const std::size_t i : {2U, 0U, 1U}) scheduler.filled(fills[i].slot);
  EXPECT_EQ(take(scheduler), (Experts{2, 3, 0, 1}));  // the resident first
  EXPECT_EQ(take(scheduler), Experts{});
}

TEST(Scheduler, counts_hits_late_ones_and_misses) {
  Scheduler scheduler = make(2, 4, 8);
  run(scheduler, 0, all_of(4));  // reads layer 1 ahead
  const auto ahead = start(scheduler);
  ASSERT_EQ(ahead.size(), 4u);
  scheduler.filled(ahead[0].slot);
  scheduler.failed(ahead[1].slot, 0);
  scheduler.need(1, Experts{0, 1, 2});
  const LayerStats& stats = scheduler.stats()[1];
  EXPECT_EQ(stats.hits, 1u);
  EXPECT_EQ(stats.misses, 1u);
  EXPECT_EQ(stats.late, 1u);
}

TEST(Scheduler, predictions_are_counted_by_layer) {
  Scheduler scheduler = make(2, 4, 4);
  const std::vector<float> scores(4, 0.25F);
  scheduler.predict(1, scores);
  scheduler.predict(1, scores);
  EXPECT_EQ(scheduler.stats()[0].predictions, 0u);
  EXPECT_EQ(scheduler.stats()[1].predictions, 2u);
}

TEST(Scheduler, a_leased_expert_is_never_evicted) {
  Scheduler scheduler = make(1, 4, 2);
  scheduler.need(0, Experts{0, 1, 2});
  for (const Fill& fill : start(scheduler)) scheduler.filled(fill.slot);
  EXPECT_EQ(take(scheduler), (Experts{0, 1}));
  EXPECT_FALSE(scheduler.next_fill());  // both slots are leased
  scheduler.computed(1);
  const auto fill = scheduler.next_fill();
  ASSERT_TRUE(fill);
  EXPECT_EQ(fill->slot, 1u);
}

TEST(Scheduler, a_hit_counts_as_a_use_for_eviction) {
  Scheduler scheduler = make(1, 4, 2);
  run(scheduler, 0, {0});
  run(scheduler, 0, {1});
  run(scheduler, 0, {0});
  run(scheduler, 0, {2});  // in place of 1
  EXPECT_EQ(run(scheduler, 0, {0}), 0u);
  EXPECT_EQ(run(scheduler, 0, {1}), 1u);
}

TEST(Scheduler, a_slot_that_is_being_filled_is_never_overwritten) {
  Scheduler scheduler = make(1, 4, 2);
  scheduler.need(0, Experts{0, 1, 2});
  const auto fills = start(scheduler);
  ASSERT_EQ(fills.size(), 2u);
  EXPECT_NE(fills[0].slot, fills[1].slot);
  scheduler.abandon_need();
  scheduler.need(0, Experts{3});
  EXPECT_FALSE(scheduler.next_fill());
  scheduler.filled(fills[1].slot);
  const auto next = scheduler.next_fill();
  ASSERT_TRUE(next);
  EXPECT_EQ(next->slot, fills[1].slot);
}

TEST(Scheduler, a_need_of_more_experts_than_slots_runs_in_waves_and_fills_each_once) {
  for (const SlotIndex slot_count : {1U, 2U, 3U, 7U}) {
    Scheduler scheduler = make(1, 16, slot_count);
    EXPECT_EQ(run(scheduler, 0, all_of(16)), 16u) << slot_count << " slots";
  }
}

TEST(Scheduler, residents_of_a_wave_are_used_before_they_leave) {
  Scheduler scheduler = make(1, 8, 4);
  run(scheduler, 0, {4, 5, 6, 7});
  EXPECT_EQ(run(scheduler, 0, all_of(8)), 4u);
  EXPECT_EQ(scheduler.stats()[0].hits, 4u);
}

TEST(Scheduler, demands_start_before_every_prefetch) {
  Scheduler scheduler = make(3, 4, 12);
  run(scheduler, 0, all_of(4));
  scheduler.need(2, Experts{1, 3});
  const auto fills = start(scheduler);
  ASSERT_EQ(fills.size(), 6u);
  for (std::size_t i = 0; i < fills.size(); ++i) {
    EXPECT_EQ(fills[i].kind, i < 2 ? FillKind::demand : FillKind::prefetch);
    EXPECT_EQ(fills[i].expert.layer, i < 2 ? 2 : 1);
  }
}

TEST(Scheduler, prefetches_wait_when_only_demands_are_asked_for) {
  Scheduler scheduler = make(2, 4, 8);
  run(scheduler, 0, all_of(4));
  EXPECT_FALSE(scheduler.next_fill(FillKind::demand));
  EXPECT_TRUE(scheduler.next_fill(FillKind::prefetch));
}

TEST(Scheduler, only_a_need_of_a_whole_layer_reads_ahead) {
  Scheduler scheduler = make(3, 4, 12);
  run(scheduler, 0, {0, 1, 2});
  EXPECT_FALSE(scheduler.next_fill());
  run(scheduler, 0, all_of(4));
  EXPECT_EQ(land_prefetches(scheduler), (std::vector<ExpertId>{{1, 0}, {1, 1}, {1, 2}, {1, 3}}));
  run(scheduler, 2, all_of(4));  // there is no layer 3
  EXPECT_FALSE(scheduler.next_fill());
}

TEST(Scheduler, read_ahead_takes_no_leased_slot_and_none_that_was_read_ahead) {
  Scheduler scheduler = make(2, 4, 5);
  scheduler.need(0, all_of(4));
  for (const Fill& fill : start(scheduler, FillKind::demand)) scheduler.filled(fill.slot);
  EXPECT_EQ(take(scheduler).size(), 4u);
  EXPECT_EQ(land_prefetches(scheduler), (std::vector<ExpertId>{{1, 0}}));  // the spare slot
  scheduler.computed(2);
  EXPECT_EQ(land_prefetches(scheduler), (std::vector<ExpertId>{{1, 1}}));
  for (const std::uint16_t expert : Experts{0, 1, 3}) scheduler.computed(expert);
  EXPECT_EQ(land_prefetches(scheduler), (std::vector<ExpertId>{{1, 2}, {1, 3}}));
  EXPECT_EQ(run(scheduler, 1, all_of(4)), 0u);
  EXPECT_EQ(scheduler.stats()[1].hits, 4u);
}

TEST(Scheduler, read_ahead_keeps_what_the_next_layer_has_already) {
  Scheduler scheduler = make(2, 4, 4);
  run(scheduler, 1, {0, 1});
  run(scheduler, 0, {0, 1});
  run(scheduler, 0, {0, 1});  // layer 1 was used longest ago
  scheduler.need(0, all_of(4));
  EXPECT_EQ(take(scheduler), (Experts{0, 1}));
  for (const std::uint16_t expert : Experts{0, 1}) scheduler.computed(expert);
  for (int i = 0; i < 2; ++i) {
    const auto fill = scheduler.next_fill(FillKind::demand);
    ASSERT_TRUE(fill);
    scheduler.filled(fill->slot);
    for (const std::uint16_t expert : take(scheduler)) scheduler.computed(expert);
  }
  EXPECT_EQ(land_prefetches(scheduler), (std::vector<ExpertId>{{1, 2}, {1, 3}}));
  EXPECT_EQ(run(scheduler, 1, all_of(4)), 0u);
  EXPECT_EQ(scheduler.stats()[1].hits, 4u);
}

TEST(Scheduler, a_demand_may_take_a_slot_that_was_read_ahead_when_there_is_no_other) {
  Scheduler scheduler = make(3, 4, 4);
  run(scheduler, 0, all_of(4));
  EXPECT_EQ(land_prefetches(scheduler).size(), 4u);
  scheduler.need(2, Experts{0});
  const auto fill = scheduler.next_fill();
  ASSERT_TRUE(fill);
  EXPECT_EQ(fill->expert, (ExpertId{2, 0}));
}

TEST(Scheduler, what_was_read_ahead_loses_its_protection_with_the_iteration) {
  Scheduler scheduler = make(3, 2, 3);
  run(scheduler, 1, {0});
  run(scheduler, 0, all_of(2));  // keeps the expert of layer 1, which is the oldest
  const auto oldest_leaves = [&] {
    scheduler.need(2, Experts{0});
    const auto fill = scheduler.next_fill(FillKind::demand);
    scheduler.abandon_need();
    scheduler.failed(fill.value().slot, 0);
    return fill->slot == 0;
  };
  EXPECT_FALSE(oldest_leaves());
  run(scheduler, 0, {0, 1});
  scheduler.end_iteration();
  EXPECT_FALSE(scheduler.next_fill());  // and what had not started is withdrawn
  EXPECT_TRUE(oldest_leaves());
}

TEST(Scheduler, a_need_withdraws_the_predictions_of_its_layer_that_it_does_not_want) {
  Scheduler scheduler = make(2, 4, 8);
  run(scheduler, 0, all_of(4));
  scheduler.need(1, Experts{2});
  const auto fills = start(scheduler);
  ASSERT_EQ(fills.size(), 1u);
  EXPECT_EQ(fills[0].expert, (ExpertId{1, 2}));
  EXPECT_EQ(fills[0].kind, FillKind::demand);
}

TEST(Scheduler, a_failed_fill_that_the_need_waits_for_is_told_and_leaves_the_slot_empty) {
  Scheduler scheduler = make(1, 4, 1);
  scheduler.need(0, Experts{0, 1});
  const auto fill = scheduler.next_fill();
  ASSERT_TRUE(fill);
  EXPECT_TRUE(scheduler.failed(fill->slot, 0));
  scheduler.abandon_need();
  EXPECT_FALSE(scheduler.next_fill());
  EXPECT_EQ(total(scheduler).demand_bytes, 0u);
  EXPECT_EQ(run(scheduler, 0, {0, 1}), 2u);  // it is read again
}

TEST(Scheduler, a_failed_prefetch_that_is_needed_becomes_a_demand) {
  Scheduler scheduler = make(2, 4, 8);
  run(scheduler, 0, all_of(4));
  const auto fills = start(scheduler);
  ASSERT_EQ(fills.size(), 4u);
  EXPECT_FALSE(scheduler.failed(fills[0].slot, 0));
  scheduler.need(1, Experts{1});
  EXPECT_FALSE(scheduler.failed(fills[3].slot, 0));
  EXPECT_FALSE(scheduler.failed(fills[1].slot, 0));
  const auto again = start(scheduler);
  ASSERT_EQ(again.size(), 1u);
  EXPECT_EQ(again[0].expert, (ExpertId{1, 1}));
  EXPECT_EQ(again[0].kind, FillKind::demand);
  EXPECT_TRUE(scheduler.failed(again[0].slot, 0));
  scheduler.abandon_need();
  EXPECT_FALSE(scheduler.failed(fills[2].slot, 0));
  EXPECT_EQ(run(scheduler, 1, all_of(4)), 4u);
}

TEST(Scheduler, an_abandoned_need_ends_its_leases_and_withdraws_its_demands) {
  Scheduler scheduler = make(1, 8, 2);
  scheduler.need(0, Experts{0, 1, 2, 3});
  const auto fills = start(scheduler);
  ASSERT_EQ(fills.size(), 2u);
  scheduler.filled(fills[0].slot);
  scheduler.abandon_need();
  EXPECT_EQ(take(scheduler), Experts{});
  scheduler.filled(fills[1].slot);  // lands for nobody
  EXPECT_EQ(take(scheduler), Experts{});
  EXPECT_FALSE(scheduler.next_fill());
  EXPECT_EQ(scheduler.resident_count(), 2u);
  EXPECT_EQ(run(scheduler, 0, {4, 5}), 2u);  // both slots may be evicted
  EXPECT_EQ(total(scheduler).demand_bytes, 3 * blob_bytes);
  EXPECT_EQ(total(scheduler).prefetch_bytes, blob_bytes);
}

TEST(Scheduler, a_prompt_is_read_ahead_whatever_the_policy_admits) {
  for (const char* policy : {"on-demand", "sp-moe", "horizon", "oracle"}) {
    Scheduler scheduler{{2, 4, 4, blob_bytes}, {policy, "auto"}};
    run(scheduler, 0, all_of(4));  // fills every slot
    EXPECT_EQ(land_prefetches(scheduler).size(), 4u) << policy;
    EXPECT_EQ(scheduler.stats()[1].prefetch_bytes, 4 * blob_bytes) << policy;
  }
}

TEST(Scheduler, a_prefetched_byte_is_used_or_wasted) {
  Scheduler scheduler = make(2, 4, 4);
  run(scheduler, 0, all_of(4));
  EXPECT_EQ(land_prefetches(scheduler).size(), 4u);
  EXPECT_EQ(scheduler.stats()[1].prefetch_bytes, 4 * blob_bytes);
  EXPECT_EQ(scheduler.stats()[1].prefetch_used_bytes, 0u);
  run(scheduler, 1, {1, 3});
  run(scheduler, 1, {1, 3});  // used once all the same
  run(scheduler, 0, all_of(4));
  EXPECT_EQ(scheduler.stats()[1].prefetch_bytes, 4 * blob_bytes);
  EXPECT_EQ(scheduler.stats()[1].prefetch_used_bytes, 2 * blob_bytes);
  EXPECT_EQ(scheduler.stats()[1].demand_bytes, 0u);
  EXPECT_EQ(scheduler.stats()[0].demand_bytes, 8 * blob_bytes);
}

using To = FillChange::To;

/// All changes that are to be told.
std::vector<std::pair<SlotIndex, To>> changes(Scheduler& scheduler) {
  std::vector<std::pair<SlotIndex, To>> told;
  while (const auto change = scheduler.next_change()) told.emplace_back(change->slot, change->to);
  return told;
}

/// Reads layer 1 ahead, all four of its experts being under way, then needs expert 2 alone.
struct Withdrawn {
  Withdrawn() {
    run(scheduler, 0, all_of(4));
    fills = start(scheduler);
    scheduler.need(1, Experts{2});
  }
  Scheduler scheduler = make(3, 4, 8);
  std::vector<Fill> fills;  // by expert
};

TEST(Scheduler, a_need_withdraws_the_prefetches_under_way_that_it_does_not_want) {
  Withdrawn it;
  ASSERT_EQ(it.fills.size(), 4u);
  auto told = changes(it.scheduler);
  std::ranges::sort(told);
  std::vector<std::pair<SlotIndex, To>> expected;
  for (const Fill& fill : it.fills) {
    expected.emplace_back(fill.slot, fill.expert.expert == 2 ? To::promoted : To::withdrawn);
  }
  EXPECT_EQ(told, expected);
  EXPECT_EQ(it.scheduler.stats()[1].late, 1u);
  it.scheduler.filled(it.fills[2].slot);
  EXPECT_EQ(take(it.scheduler), Experts{2});
  it.scheduler.computed(2);
  it.scheduler.withdrawn(it.fills[0].slot, 0);
  it.scheduler.withdrawn(it.fills[1].slot, 300);
  it.scheduler.filled(it.fills[3].slot);  // too late
  EXPECT_EQ(it.scheduler.resident_count(), 6u);
  const LayerStats& stats = it.scheduler.stats()[1];
  EXPECT_EQ(stats.prefetch_bytes, 2 * blob_bytes + 300);
  EXPECT_EQ(stats.prefetch_used_bytes, blob_bytes);
  EXPECT_EQ(stats.cancelled_bytes, 2 * blob_bytes - 300);
  EXPECT_EQ(stats.cancelled, 0u);  // all had started
  EXPECT_EQ(run(it.scheduler, 1, all_of(4)), 2u);
  EXPECT_EQ(changes(it.scheduler).size(), 0u);
}

TEST(Scheduler, a_withdrawn_expert_that_is_needed_is_read_again_once_its_end_is_told) {
  Withdrawn it;
  it.scheduler.abandon_need();
  static_cast<void>(changes(it.scheduler));
  it.scheduler.need(1, Experts{0, 1, 3});
  EXPECT_EQ(it.scheduler.stats()[1].misses, 3u);
  EXPECT_FALSE(it.scheduler.next_fill());
  EXPECT_EQ(take(it.scheduler), Experts{});
  it.scheduler.withdrawn(it.fills[1].slot, 999);
  const auto again = start(it.scheduler);
  ASSERT_EQ(again.size(), 1u);
  EXPECT_EQ(again[0].expert, (ExpertId{1, 1}));
  EXPECT_EQ(again[0].kind, FillKind::demand);
  EXPECT_FALSE(it.scheduler.failed(it.fills[0].slot, 10));  // not this need's read
  EXPECT_EQ(start(it.scheduler).size(), 1u);
  it.scheduler.filled(it.fills[3].slot);  // whole all the same
  EXPECT_EQ(take(it.scheduler), Experts{3});
  it.scheduler.filled(again[0].slot);
  EXPECT_EQ(take(it.scheduler), Experts{1});
  EXPECT_FALSE(it.scheduler.next_fill());
  EXPECT_EQ(it.scheduler.stats()[1].prefetch_bytes, 999u + 10 + blob_bytes);
  EXPECT_EQ(it.scheduler.stats()[1].prefetch_used_bytes, blob_bytes);
  EXPECT_EQ(it.scheduler.stats()[1].demand_bytes, blob_bytes);
}

TEST(Scheduler, no_prefetch_passes_a_demand_that_waits_for_the_end_of_a_withdrawn_fill) {
  Withdrawn it;
  it.scheduler.abandon_need();
  it.scheduler.need(1, all_of(4));  // reads layer 2 ahead
  EXPECT_FALSE(it.scheduler.next_fill());
  for (const std::size_t expert : {0U, 1U, 3U}) {
    it.scheduler.withdrawn(it.fills[expert].slot, 0);
    EXPECT_EQ(it.scheduler.next_fill().value().kind, FillKind::demand);
  }
  EXPECT_EQ(it.scheduler.next_fill().value().expert.layer, 2);
}

TEST(Scheduler, a_prefetch_that_is_asked_for_again_waits_for_the_end_of_the_withdrawn_one) {
  Scheduler scheduler{{2, 4, 8, blob_bytes, 1}, {"sp-moe", "auto"}};
  const std::vector<float> scores{0, 1.5F, 0, 0};
  scheduler.predict(1, scores);
  const auto first = scheduler.next_fill().value();
  scheduler.end_iteration();
  EXPECT_EQ(changes(scheduler), (std::vector{std::pair{first.slot, To::withdrawn}}));
  scheduler.predict(1, scores);
  EXPECT_FALSE(scheduler.next_fill());
  scheduler.withdrawn(first.slot, 1);
  EXPECT_EQ(scheduler.next_fill().value().expert, (ExpertId{1, 1}));
}

TEST(Scheduler, the_end_of_an_iteration_withdraws_what_was_drafted_for_layers_that_did_not_run) {
  for (const bool early : {false, true}) {
    Scheduler scheduler{{3, 4, 8, blob_bytes, 2}, {"sp-moe", "auto"}};
    const std::vector<float> scores{1.5F, 1.5F, 0, 0};
    for (std::uint16_t layer = 0; layer < 3; ++layer) scheduler.predict(layer, scores);
    const auto fills = start(scheduler);
    ASSERT_EQ(fills.size(), 6u);
    scheduler.filled(fills[4].slot);
    scheduler.need(0, Experts{0, 1});
    EXPECT_EQ(changes(scheduler).size(), 2u);  // are promoted
    // A request that ended early leaves its iteration to the next one.
    early ? scheduler.begin_request() : scheduler.end_iteration();
    EXPECT_EQ(changes(scheduler), (std::vector{std::pair{fills[2].slot, To::withdrawn},
                                               std::pair{fills[3].slot, To::withdrawn},
                                               std::pair{fills[5].slot, To::withdrawn}}));
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

TEST(Scheduler, what_the_running_need_waits_for_is_never_withdrawn) {
  Scheduler scheduler{{1, 4, 4, blob_bytes, 1}, {"sp-moe", "auto"}};
  const std::vector<float> scores{0, 1.5F, 0, 0};
  scheduler.predict(0, scores);
  const auto fill = scheduler.next_fill().value();
  scheduler.need(0, Experts{1});
  EXPECT_EQ(changes(scheduler), (std::vector{std::pair{fill.slot, To::promoted}}));
  // Another thread ends iterations and predicts meanwhile.
  scheduler.end_iteration();
  scheduler.predict(0, scores);
  EXPECT_FALSE(scheduler.next_fill());
  scheduler.end_iteration();
  EXPECT_EQ(changes(scheduler).size(), 0u);
  scheduler.filled(fill.slot);
  EXPECT_EQ(take(scheduler), Experts{1});
}

TEST(Scheduler, horizon_finishes_what_is_often_used) {
  Scheduler scheduler{{2, 4, 8, blob_bytes, 1}, {"horizon", "auto"}};
  for (int pass = 0; pass < 40; ++pass) {
    scheduler.need(1, Experts{0});
    EXPECT_TRUE(scheduler.failed(scheduler.next_fill().value().slot, 0));  // never resident
    scheduler.abandon_need();
    scheduler.end_iteration();
  }
  scheduler.predict(1, std::vector<float>{1.5F, 1.5F, 0, 0});
  const auto fills = start(scheduler);
  ASSERT_EQ(fills.size(), 2u);
  EXPECT_EQ(fills[1].expert, (ExpertId{1, 1}));
  scheduler.need(1, Experts{2});
  EXPECT_EQ(changes(scheduler), (std::vector{std::pair{fills[1].slot, To::withdrawn}}));
}

TEST(Scheduler, a_failed_fill_accounts_for_what_it_moved) {
  Scheduler scheduler = make(2, 4, 4);
  scheduler.need(0, Experts{0});
  EXPECT_TRUE(scheduler.failed(scheduler.next_fill().value().slot, 700));
  scheduler.abandon_need();
  EXPECT_EQ(scheduler.stats()[0].demand_bytes, 700u);
  run(scheduler, 0, all_of(4));
  EXPECT_FALSE(scheduler.failed(scheduler.next_fill().value().slot, 20));
  EXPECT_EQ(scheduler.stats()[1].prefetch_bytes, 20u);
  EXPECT_EQ(scheduler.stats()[1].prefetch_used_bytes, 0u);
}

TEST(Scheduler, a_layer_that_does_not_exist_is_refused_unchanged) {
  Scheduler scheduler = make(2, 4, 4);
  EXPECT_THROW(scheduler.need(2, Experts{0}), std::out_of_range);
  EXPECT_THROW(scheduler.predict(2, {}), std::out_of_range);
  EXPECT_FALSE(scheduler.next_fill());
  EXPECT_EQ(run(scheduler, 0, {0}), 1u);
}

/// Drives a Scheduler at random, the way the runtime does, and holds every answer against a plain
/// model of what the slots and the running need must look like.
class Walk {
 public:
  Walk(const SchedulerShape& shape, std::uint32_t seed)
      : shape_{shape}, random_{seed}, scheduler_{shape}, slots_(shape.slot_count) {}

  /// One random action. Fails the running test if an invariant is broken.
  void step() {
    if (!running_) {
      switch (pick(8)) {
        case 0: return end_iteration();
        case 1: return land();
        case 2: return pick(2) == 0 ? start(FillKind::prefetch) : tell_changes();
        case 3: return scheduler_.predict(static_cast<std::uint16_t>(pick(shape_.layer_count)), {});
        default: return need();
      }
    }
    const auto chance = pick(100);
    if (chance < 30) return start(pick(3) == 0 ? FillKind::demand : FillKind::prefetch);
    if (chance < 60) return land();
    if (chance < 90) return compute();
    if (chance < 92) return end_iteration();
    if (chance < 93) return abandon();
    return take();
  }

  /// Ends the running need without failures. It must take a bounded number of actions.
  void finish() {
    may_fail_ = false;
    for (int turns = 0; running_; ++turns) {
      ASSERT_LT(turns, 1000) << "the need is stuck";
      start(FillKind::demand);
      land();
      take();
      compute();
    }
  }

  void check() const {
    const LayerStats sum = total(scheduler_);
    ASSERT_EQ(sum.demand_bytes, moved_demand_);
    ASSERT_EQ(sum.prefetch_bytes, moved_prefetch_);
    ASSERT_EQ(sum.prefetch_used_bytes, used_prefetch_);
    const std::uint64_t wasted = sum.prefetch_bytes - sum.prefetch_used_bytes;
    ASSERT_EQ(sum.demand_bytes + sum.prefetch_used_bytes + wasted, moved_demand_ + moved_prefetch_);
    ASSERT_EQ(sum.cancelled_bytes, cancelled_bytes_);
    ASSERT_EQ(sum.hits, hits_);
    ASSERT_EQ(sum.late, late_);
    ASSERT_EQ(sum.misses, misses_);
    ASSERT_EQ(scheduler_.resident_count(), std::ranges::count_if(slots_, [](const ModelSlot& slot) {
                return slot.expert && !slot.filling;
              }));
  }

  [[nodiscard]] std::uint64_t needs_ended() const { return needs_ended_; }

 private:
  struct ModelSlot {
    std::optional<ExpertId> expert;
    bool filling = false;
    FillKind kind = FillKind::demand;
    bool leased = false;
    bool unused = false;   // prefetched, and not used since
    bool protect = false;  // from prefetches
    bool withdrawn = false;
  };
  enum class Want : std::uint8_t { waiting, landed, taken };

  std::size_t pick(std::size_t count) { return random_() % count; }

  std::optional<SlotIndex> find(ExpertId expert) const {
    for (SlotIndex slot = 0; slot < shape_.slot_count; ++slot) {
      if (slots_[slot].expert == expert) return slot;
    }
    return std::nullopt;
  }

  void need() {
    // Mostly one layer after the other, as a forward pass goes.
    layer_ = static_cast<std::uint16_t>(pick(10) == 0 ? pick(shape_.layer_count)
                                                      : (layer_ + 1U) % shape_.layer_count);
    Experts experts = all_of(shape_.expert_count);
    if (pick(3) != 0) {
      std::ranges::shuffle(experts, random_);
      experts.resize(pick(experts.size()));
    }
    running_ = true;
    broken_ = false;
    wants_.clear();
    fills_in_need_.clear();
    std::erase_if(ahead_, [this](ExpertId id) { return id.layer == layer_; });
    for (const std::uint16_t expert : experts) {
      const auto slot = find({layer_, expert});
      wants_[expert] = Want::waiting;
      if (!slot || slots_[*slot].withdrawn) {
        ++misses_;
        demands_.insert({layer_, expert});
      } else if (slots_[*slot].filling) {
        ++late_;
        if (slots_[*slot].kind == FillKind::prefetch) changes_[*slot] = FillChange::To::promoted;
      } else {
        ++hits_;
        become_ready(*slot);
      }
    }
    for (SlotIndex i = 0; i < shape_.slot_count; ++i) {
      ModelSlot& slot = slots_[i];
      if (!slot.expert || slot.expert->layer != layer_) continue;
      slot.protect = false;
      const bool prefetching = slot.filling && slot.kind == FillKind::prefetch;
      if (!prefetching || slot.withdrawn || wants_.contains(slot.expert->expert)) continue;
      slot.withdrawn = true;
      changes_[i] = FillChange::To::withdrawn;
    }
    const auto next = static_cast<std::uint16_t>(layer_ + 1);
    if (experts.size() == shape_.expert_count && next < shape_.layer_count) {
      for (const std::uint16_t expert : all_of(shape_.expert_count)) {
        const auto slot = find({next, expert});
        if (slot && !slots_[*slot].withdrawn) {
          slots_[*slot].protect = true;
        } else {
          ahead_.insert({next, expert});
        }
      }
    }
    scheduler_.need(layer_, experts);
    if (pick(4) != 0) tell_changes();
    end_if_done();
  }

  void tell_changes() {
    while (const auto change = scheduler_.next_change()) {
      const auto expected = changes_.find(change->slot);
      ASSERT_NE(expected, changes_.end()) << "a change that nobody asked for";
      ASSERT_EQ(change->to, expected->second);
      changes_.erase(expected);
    }
    ASSERT_TRUE(changes_.empty());
  }

  void become_ready(SlotIndex slot) {
    ModelSlot& it = slots_[slot];
    it.leased = true;
    if (it.unused) used_prefetch_ += blob_bytes;
    it.unused = it.protect = false;
    wants_[it.expert->expert] = Want::landed;
    expected_.push_back({it.expert->expert, slot});
  }

  void start(FillKind at_least) {
    const auto fill = scheduler_.next_fill(at_least);
    if (!fill) {
      // Only for want of work, or of a slot that may be given up.
      const auto may_start = [this](ExpertId expert) { return !find(expert); };
      if (demands_.empty() && (at_least == FillKind::demand || ahead_.empty())) return;
      if (!demands_.empty() && std::ranges::none_of(demands_, may_start)) return;
      if (demands_.empty() && std::ranges::none_of(ahead_, may_start)) return;
      for (const ModelSlot& slot : slots_) {
        ASSERT_TRUE(slot.expert &&
                    (slot.filling || slot.leased || (demands_.empty() && slot.protect)))
            << "a fill could have started";
      }
      return;
    }
    ModelSlot& slot = slots_.at(fill->slot);
    ASSERT_FALSE(slot.filling) << "a slot being filled was overwritten";
    ASSERT_FALSE(slot.leased) << "a leased expert was evicted";
    ASSERT_FALSE(find(fill->expert)) << "an expert has two slots";
    if (fill->kind == FillKind::demand) {
      ASSERT_EQ(demands_.erase(fill->expert), 1u) << "a fill that nobody demanded";
      ASSERT_EQ(++fills_in_need_[fill->expert], 1) << "filled twice in one need";
    } else {
      ASSERT_TRUE(demands_.empty()) << "a prefetch went before a demand";
      ASSERT_EQ(at_least, FillKind::prefetch);
      ASSERT_EQ(ahead_.erase(fill->expert), 1u) << "a fill that nobody predicted";
      ASSERT_FALSE(slot.expert && slot.protect) << "a prefetch evicted what is still to be used";
    }
    const bool prefetch = fill->kind == FillKind::prefetch;
    slot = {fill->expert, true, fill->kind, false, prefetch, prefetch};
    // A slot is given up only when none is empty.
    in_flight_.push_back(fill->slot);
  }

  void land() {
    if (in_flight_.empty()) return;
    const auto place = in_flight_.begin() + static_cast<std::ptrdiff_t>(pick(in_flight_.size()));
    const SlotIndex landed = *place;
    in_flight_.erase(place);
    ModelSlot& slot = slots_[landed];
    const ExpertId expert = slot.expert.value();
    const auto want = wants_.find(expert.expert);
    const bool waited =
        running_ && expert.layer == layer_ && want != wants_.end() && want->second == Want::waiting;
    std::uint64_t& moved = slot.kind == FillKind::demand ? moved_demand_ : moved_prefetch_;
    const std::uint64_t part = pick(blob_bytes);
    changes_.erase(landed);
    if (may_fail_ && pick(20) == 0) {
      const bool demanded = waited && slot.kind == FillKind::demand;
      slot = {};
      moved += part;
      if (demanded) wants_.erase(want);
      if (waited && !demanded) demands_.insert(expert);
      broken_ |= demanded;
      ASSERT_EQ(scheduler_.failed(landed, part), demanded);
      return;
    }
    if (slot.withdrawn && pick(4) != 0) {
      slot = {};
      moved += part;
      cancelled_bytes_ += blob_bytes - part;
      scheduler_.withdrawn(landed, part);
      return;
    }
    if (slot.withdrawn) demands_.erase(expert);
    slot.filling = slot.withdrawn = false;
    moved += blob_bytes;
    if (waited) become_ready(landed);
    scheduler_.filled(landed);
  }

  void take() {
    std::vector<ReadyExpert> ready;
    scheduler_.take_ready(ready);
    ASSERT_EQ(ready.size(), expected_.size());
    for (std::size_t i = 0; i < ready.size(); ++i) {
      ASSERT_EQ(ready[i].expert, expected_[i].expert);
      ASSERT_EQ(ready[i].slot, expected_[i].slot);
      wants_.at(ready[i].expert) = Want::taken;
    }
    expected_.clear();
  }

  void compute() {
    const auto taken =
        std::ranges::find_if(wants_, [](const auto& want) { return want.second == Want::taken; });
    if (taken != wants_.end()) {
      slots_[find({layer_, taken->first}).value()].leased = false;
      scheduler_.computed(taken->first);
      wants_.erase(taken);
    } else if (broken_) {
      abandon();
    }
    end_if_done();
  }

  void end_if_done() {
    if (!running_ || broken_ || !wants_.empty()) return;
    running_ = false;
    ++needs_ended_;
  }

  void abandon() {
    scheduler_.abandon_need();
    for (const auto& [expert, want] : wants_) {
      const auto slot = find({layer_, expert});
      if (want != Want::waiting || !slot || slots_[*slot].withdrawn) continue;
      slots_[*slot].kind = FillKind::prefetch;
      slots_[*slot].unused = true;
    }
    wants_.clear();
    expected_.clear();
    demands_.clear();
    for (ModelSlot& slot : slots_) slot.leased = false;
    running_ = broken_ = false;
  }

  void end_iteration() {
    scheduler_.end_iteration();
    ahead_.clear();
    for (ModelSlot& slot : slots_) slot.protect = false;
  }

  SchedulerShape shape_;
  std::mt19937 random_;
  Scheduler scheduler_;
  std::vector<ModelSlot> slots_;
  std::vector<SlotIndex> in_flight_;
  std::set<ExpertId> demands_;                   // not started
  std::set<ExpertId> ahead_;                     // to be read ahead, not started
  std::map<SlotIndex, FillChange::To> changes_;  // not told
  std::uint16_t layer_ = 0;
  bool running_ = false;
  bool broken_ = false;  // a fill that the need waited for has failed
  bool may_fail_ = true;
  std::map<std::uint16_t, Want> wants_;
  std::map<ExpertId, int> fills_in_need_;
  std::vector<ReadyExpert> expected_;
  std::uint64_t hits_ = 0, late_ = 0, misses_ = 0, needs_ended_ = 0, cancelled_bytes_ = 0;
  std::uint64_t moved_demand_ = 0, moved_prefetch_ = 0, used_prefetch_ = 0;
};

TEST(Scheduler, keeps_its_invariants_on_random_walks) {
  constexpr SchedulerShape shapes[] = {{3, 6, 1, blob_bytes},
                                       {3, 6, 2, blob_bytes},
                                       {4, 5, 7, blob_bytes},
                                       {2, 8, 13, blob_bytes},
                                       {3, 4, 12, blob_bytes}};
  for (std::uint32_t seed = 1; seed <= 40; ++seed) {
    const SchedulerShape& shape = shapes[seed % std::size(shapes)];
    SCOPED_TRACE(::testing::Message() << "seed " << seed << ", " << shape.slot_count << " slots");
    Walk walk{shape, seed};
    for (int step = 0; step < 6000; ++step) {
      walk.step();
      walk.check();
      if (::testing::Test::HasFatalFailure()) FAIL() << "at step " << step;
    }
    walk.finish();
    walk.check();
    EXPECT_GT(walk.needs_ended(), 10u);
  }
}

/// Drives a Scheduler under any policies with random predictions, and holds what it does against
/// what no policy may break. A simpler model than Walk's, which knows the one right answer.
class PolicyWalk {
 public:
  PolicyWalk(const SchedulerShape& shape, const PolicyNames& names, std::uint32_t seed)
      : shape_{shape}, random_{seed}, scheduler_{shape, names}, slots_(shape.slot_count) {
    scheduler_.limits().break_even = 0.3F;
    if (seed % 2 == 0) {
      scheduler_.limits().budget_bytes.assign(shape.layer_count, 3 * blob_bytes);
      scheduler_.limits().cutoff_layer = 2;
    }
    routing_ = random_routing();
    // Half the walks follow the trace, the others leave it.
    RoutingTrace trace{shape.layer_count, shape.expert_count};
    for (std::size_t need = 0; need < routing_.size(); ++need) {
      trace.append(layer_of(need), routing_[need]);
    }
    scheduler_.replay(std::move(trace));
    if (seed % 4 > 1) routing_ = random_routing();
  }

  /// Drafts, verifies and ends one iteration; sometimes all that was drafted is rejected.
  void iterate() {
    const std::size_t pass = iterations_++ % passes;
    if (iterations_ % 7 == 0) scheduler_.begin_request();
    for (std::size_t token = 0; token < 3; ++token) {
      for (std::uint16_t layer = 0; layer < shape_.layer_count; ++layer) {
        predict(layer, routing_[pass * shape_.layer_count + layer], PredictionSource::draft);
        if (random_() % 2 == 0) start(FillKind::prefetch);
        if (random_() % 2 == 0) land();
      }
    }
    const bool verified = random_() % 5 != 0;
    for (std::uint16_t layer = 0; verified && layer < shape_.layer_count; ++layer) {
      run(layer, routing_[pass * shape_.layer_count + layer]);
      if (::testing::Test::HasFatalFailure()) return;
    }
    scheduler_.end_iteration();
    check();
  }

  /// Lands all that is under way, so that the counters can be closed.
  void finish() {
    while (!in_flight_.empty()) land();
    check();
    EXPECT_GT(moved_bytes_, 0u);
  }

 private:
  static constexpr std::size_t passes = 12;

  std::uint16_t layer_of(std::size_t need) const {
    return static_cast<std::uint16_t>(need % shape_.layer_count);
  }

  std::vector<Experts> random_routing() {
    std::vector<Experts> needs;
    for (std::size_t need = 0; need < passes * shape_.layer_count; ++need) {
      Experts experts = all_of(shape_.expert_count);
      std::ranges::shuffle(experts, random_);
      // A prompt now and then, else some of the experts.
      if (need >= shape_.layer_count) experts.resize(1 + random_() % (experts.size() - 1));
      needs.push_back(std::move(experts));
    }
    return needs;
  }

  void predict(std::uint16_t layer, const Experts& truth, PredictionSource source) {
    std::vector<float> scores(shape_.expert_count, 0.01F);
    switch (random_() % 4) {
      case 0:  // right
        for (const std::uint16_t expert : truth) scores[expert] = 1.5F;
        break;
      case 1:  // wrong everywhere
        std::ranges::fill(scores, 1.5F);
        for (const std::uint16_t expert : truth) scores[expert] = 0;
        break;
      case 2:
        std::ranges::generate(scores, [this] { return static_cast<float>(random_() % 100) / 50; });
        scores[random_() % scores.size()] = std::numeric_limits<float>::infinity();
        break;
      default: std::ranges::fill(scores, std::numeric_limits<float>::quiet_NaN());
    }
    scheduler_.predict(layer, scores, source);
  }

  void run(std::uint16_t layer, const Experts& experts) {
    scheduler_.need(layer, experts);
    running_ = true;
    std::size_t computed = 0;
    Experts taken;
    for (int turns = 0; computed < experts.size(); ++turns) {
      ASSERT_LT(turns, 2000) << "the need of layer " << layer << " is stuck";
      if (random_() % 4 == 0 && layer + 1 < shape_.layer_count) {
        const auto next = static_cast<std::uint16_t>(layer + 1);
        predict(next, experts, PredictionSource::target);
      }
      start(random_() % 3 == 0 ? FillKind::demand : FillKind::prefetch);
      if (random_() % 2 == 0) land();
      std::vector<ReadyExpert> ready;
      scheduler_.take_ready(ready);
      for (const ReadyExpert& each : ready) {
        ModelSlot& slot = slots_.at(each.slot);
        ASSERT_EQ(slot.expert, (ExpertId{layer, each.expert}));
        ASSERT_FALSE(slot.filling);
        slot.leased = true;
        if (std::exchange(slot.unused, false)) used_bytes_ += blob_bytes;
        taken.push_back(each.expert);
      }
      if (!taken.empty() && random_() % 2 == 0) {
        const std::uint16_t expert = taken.back();
        taken.pop_back();
        std::ranges::find(slots_, ExpertId{layer, expert}, &ModelSlot::expert)->leased = false;
        scheduler_.computed(expert);
        ++computed;
      }
    }
    running_ = false;
  }

  void start(FillKind at_least) {
    const auto fill = scheduler_.next_fill(at_least);
    if (!fill) return;
    ASSERT_GE(fill->kind, at_least);
    ASSERT_LT(fill->expert.layer, shape_.layer_count);
    ASSERT_LT(fill->expert.expert, shape_.expert_count);
    ModelSlot& slot = slots_.at(fill->slot);
    ASSERT_FALSE(slot.leased) << "a leased expert was evicted";
    ASSERT_FALSE(slot.filling) << "a slot being filled was overwritten";
    ASSERT_EQ(std::ranges::count(slots_, fill->expert, &ModelSlot::expert), 0)
        << "an expert has two slots";
    slot = {fill->expert, true, false, fill->kind == FillKind::prefetch};
    in_flight_.push_back(fill->slot);
  }

  void land() {
    if (in_flight_.empty()) return;
    const auto place =
        in_flight_.begin() + static_cast<std::ptrdiff_t>(random_() % in_flight_.size());
    const SlotIndex landed = *place;
    in_flight_.erase(place);
    tell_changes();
    const bool withdrawn = slots_[landed].withdrawn;
    const std::uint64_t part = random_() % blob_bytes;
    if ((!running_ || withdrawn) && random_() % 16 == 0) {
      slots_[landed] = {};
      moved_bytes_ += part;
      ASSERT_FALSE(scheduler_.failed(landed, part));
      return;
    }
    if (withdrawn && random_() % 4 != 0) {
      slots_[landed] = {};
      moved_bytes_ += part;
      cancelled_bytes_ += blob_bytes - part;
      scheduler_.withdrawn(landed, part);
      return;
    }
    slots_[landed].filling = slots_[landed].withdrawn = false;
    moved_bytes_ += blob_bytes;
    scheduler_.filled(landed);
  }

  void tell_changes() {
    while (const auto change = scheduler_.next_change()) {
      ModelSlot& slot = slots_.at(change->slot);
      ASSERT_TRUE(slot.filling) << "nothing is under way";
      if (change->to == FillChange::To::withdrawn) {
        ASSERT_FALSE(std::exchange(slot.withdrawn, true)) << "withdrawn twice";
      }
    }
  }

  void check() const {
    const LayerStats sum = total(scheduler_);
    const std::uint64_t wasted = sum.prefetch_bytes - sum.prefetch_used_bytes;
    ASSERT_LE(sum.prefetch_used_bytes, sum.prefetch_bytes);
    ASSERT_EQ(sum.prefetch_used_bytes, used_bytes_);
    ASSERT_EQ(sum.demand_bytes + sum.prefetch_used_bytes + wasted, moved_bytes_);
    ASSERT_EQ(sum.cancelled_bytes, cancelled_bytes_);
    ASSERT_EQ(scheduler_.resident_count(), std::ranges::count_if(slots_, [](const ModelSlot& slot) {
                return slot.expert && !slot.filling;
              }));
    for (const LayerStats& layer : scheduler_.stats()) {
      ASSERT_LE(layer.predicted_needs, layer.hits + layer.late + layer.misses);
      ASSERT_LE(layer.recalled, layer.recalled_2k);
      ASSERT_LE(layer.recalled_2k, layer.predicted_needs);
      ASSERT_LE(layer.recalled, layer.critical);
    }
  }

  struct ModelSlot {
    std::optional<ExpertId> expert;
    bool filling = false;
    bool leased = false;
    bool unused = false;  // prefetched, and not used since
    bool withdrawn = false;
  };

  SchedulerShape shape_;
  std::mt19937 random_;
  Scheduler scheduler_;
  std::vector<Experts> routing_;
  std::vector<ModelSlot> slots_;
  std::vector<SlotIndex> in_flight_;
  bool running_ = false;
  std::size_t iterations_ = 0;
  std::uint64_t moved_bytes_ = 0, used_bytes_ = 0, cancelled_bytes_ = 0;
};

/// Every prefetch policy with every eviction policy.
class SchedulerPolicies : public ::testing::TestWithParam<std::tuple<std::string, std::string>> {
 protected:
  PolicyNames names{std::get<0>(GetParam()), std::get<1>(GetParam())};
};

TEST_P(SchedulerPolicies, keep_the_invariants_whatever_is_predicted) {
  constexpr SchedulerShape shapes[] = {{3, 6, 1, blob_bytes, 2},
                                       {3, 6, 2, blob_bytes, 2},
                                       {4, 5, 7, blob_bytes, 2},
                                       {3, 6, 12, blob_bytes, 3}};
  for (std::uint32_t seed = 100; seed < 112; ++seed) {
    const SchedulerShape& shape = shapes[seed / 4 % std::size(shapes)];
    SCOPED_TRACE(::testing::Message() << "seed " << seed << ", " << shape.slot_count << " slots");
    PolicyWalk walk{shape, names, seed};
    for (int iteration = 0; iteration < 30; ++iteration) {
      walk.iterate();
      if (::testing::Test::HasFatalFailure()) FAIL() << "at iteration " << iteration;
    }
    walk.finish();
  }
}

TEST_P(SchedulerPolicies, survive_iterations_whose_drafts_are_all_rejected) {
  Scheduler scheduler{{3, 6, 5, blob_bytes, 2}, names};
  const std::vector<float> scores{1.5F, 0.1F, 1.2F, 0.3F, 0.0F, 0.8F};
  for (int iteration = 0; iteration < 4; ++iteration) {
    for (std::uint16_t layer = 0; layer < 3; ++layer) scheduler.predict(layer, scores);
    land_prefetches(scheduler);
    scheduler.end_iteration();
    EXPECT_FALSE(scheduler.next_fill()) << "a prefetch outlived its iteration";
  }
  const LayerStats drafted = total(scheduler);
  EXPECT_EQ(drafted.prefetch_used_bytes, 0u);
  EXPECT_EQ(drafted.predicted_needs, 0u);
  EXPECT_EQ(drafted.recalled, 0u);
  for (std::uint16_t layer = 0; layer < 3; ++layer) run(scheduler, layer, all_of(6));
  EXPECT_EQ(total(scheduler).hits + total(scheduler).misses, 18u);
}

TEST_P(SchedulerPolicies, allocate_nothing_after_construction) {
  Scheduler scheduler{{3, 6, 5, blob_bytes, 2}, names};
  RoutingTrace trace{3, 6};
  const Experts experts{0, 4};
  for (std::uint16_t need = 0; need < 12; ++need) {
    trace.append(static_cast<std::uint16_t>(need % 3), experts);
  }
  scheduler.replay(std::move(trace));
  scheduler.limits().budget_bytes.assign(3, 2 * blob_bytes);
  const std::vector<float> scores{1.5F, 0.1F, 1.2F, 0.3F, 0.0F, 0.8F};
  std::vector<ReadyExpert> ready;
  ready.reserve(6);
  const std::size_t before = allocation_count();
  for (int pass = 0; pass < 4; ++pass) {
    scheduler.begin_request();
    for (std::uint16_t layer = 0; layer < 3; ++layer) scheduler.predict(layer, scores);
    for (std::uint16_t layer = 0; layer < 3; ++layer) {
      scheduler.need(layer, experts);
      for (std::size_t computed = 0; computed < experts.size();) {
        if (const auto fill = scheduler.next_fill()) scheduler.filled(fill->slot);
        scheduler.predict(2, scores, PredictionSource::target);
        ready.clear();
        scheduler.take_ready(ready);
        for (const ReadyExpert& each : ready) scheduler.computed(each.expert);
        computed += ready.size();
      }
    }
    scheduler.end_iteration();
  }
  EXPECT_EQ(allocation_count() - before, 0u);
}

INSTANTIATE_TEST_SUITE_P(all, SchedulerPolicies,
                         ::testing::Combine(::testing::ValuesIn(prefetch_policy_names()),
                                            ::testing::ValuesIn(eviction_policy_names())),
                         [](const auto& test) {
                           return test_name(std::get<0>(test.param) + "_with_" +
                                            std::get<1>(test.param));
                         });

TEST(Scheduler, recall_counts_the_needed_experts_that_were_critical) {
  Scheduler scheduler{{2, 6, 12, blob_bytes, /*experts_per_token=*/2}};
  const std::vector<float> scores{0.5F, 0.4F, 0.3F, 0.2F, 0.1F, 0.0F};
  scheduler.predict(0, scores);
  run(scheduler, 0, {0, 2, 5});
  const LayerStats& stats = scheduler.stats()[0];
  EXPECT_EQ(stats.predicted_needs, 3u);
  EXPECT_EQ(stats.recalled, 1u);     // 0, of 0 and 1
  EXPECT_EQ(stats.recalled_2k, 2u);  // 0 and 2, of 0 to 3
  EXPECT_EQ(stats.critical, 2u);
  run(scheduler, 0, {0, 1});  // not predicted again
  EXPECT_EQ(stats.predicted_needs, 3u);
  EXPECT_EQ(stats.recalled, 1u);
}

TEST(Scheduler, recall_joins_the_tokens_of_an_iteration_and_forgets_them_with_it) {
  Scheduler scheduler{{2, 6, 12, blob_bytes, /*experts_per_token=*/2}};
  scheduler.predict(1, std::vector<float>{1.5F, 1.5F, 0, 0, 0, 0});
  scheduler.predict(1, std::vector<float>{0, 0, 0, 0, 1.5F, 1.5F});
  scheduler.end_iteration();
  scheduler.predict(1, std::vector<float>{0, 0, 1.5F, 1.5F, 0, 0});
  scheduler.predict(1, std::vector<float>{0, 1.5F, 1.5F, 0, 0, 0});
  run(scheduler, 1, {0, 1, 2, 3});
  EXPECT_EQ(scheduler.stats()[1].predicted_needs, 4u);
  EXPECT_EQ(scheduler.stats()[1].recalled, 3u);
  EXPECT_EQ(scheduler.stats()[1].critical, 3u);
}

TEST(Scheduler, evicts_as_of_the_layer_that_is_needed_next) {
  Scheduler scheduler{{3, 4, 3, blob_bytes}, {"on-demand", "next-use"}};
  for (const std::uint16_t layer : Experts{0, 1, 2}) run(scheduler, layer, {0});
  scheduler.end_iteration();
  EXPECT_EQ(run(scheduler, 0, {1}), 1u);  // in place of its own layer's, a whole pass away
  EXPECT_EQ(run(scheduler, 1, {0}), 0u);
  EXPECT_EQ(run(scheduler, 2, {0}), 0u);
}

TEST(Scheduler, prefetches_of_sp_moe_are_used_by_the_layers_they_are_for) {
  Scheduler scheduler{{3, 6, 9, blob_bytes, /*experts_per_token=*/2}, {"sp-moe", "auto"}};
  const std::vector<float> scores{1.5F, 0.2F, 1.5F, 0.1F, 0.0F, 0.0F};
  for (std::uint16_t layer = 0; layer < 3; ++layer) scheduler.predict(layer, scores);
  EXPECT_EQ(land_prefetches(scheduler),
            (std::vector<ExpertId>{{0, 0}, {0, 2}, {1, 0}, {1, 2}, {2, 0}, {2, 2}}));
  for (std::uint16_t layer = 0; layer < 3; ++layer) EXPECT_EQ(run(scheduler, layer, {0, 2}), 0u);
  EXPECT_EQ(total(scheduler).hits, 6u);
  EXPECT_EQ(total(scheduler).prefetch_used_bytes, 6 * blob_bytes);
}

TEST(Scheduler, the_oracle_moves_no_byte_in_vain) {
  std::mt19937 random{90};
  RoutingTrace trace{3, 6};
  std::vector<Experts> needs;
  for (std::uint16_t need = 0; need < 60; ++need) {
    needs.push_back(
        {static_cast<std::uint16_t>(random() % 3), static_cast<std::uint16_t>(3 + random() % 3)});
    trace.append(static_cast<std::uint16_t>(need % 3), needs.back());
  }
  Scheduler scheduler{{3, 6, 8, blob_bytes, 2}, {"oracle", "auto"}};
  scheduler.replay(std::move(trace));
  for (std::uint16_t need = 0; need < 60; ++need) {
    land_prefetches(scheduler);
    run(scheduler, static_cast<std::uint16_t>(need % 3), needs[need]);
    if (need % 3 == 2) scheduler.end_iteration();
  }
  const LayerStats sum = total(scheduler);
  EXPECT_EQ(sum.misses, 2u);  // of the first need, before which it is not asked
  EXPECT_EQ(sum.prefetch_used_bytes, sum.prefetch_bytes);
}

TEST(Scheduler, a_trace_of_another_model_is_refused) {
  Scheduler scheduler = make(3, 6, 2);
  EXPECT_EQ(message_of<InvalidArgument>([&] { scheduler.replay(RoutingTrace{3, 5}); }),
            "a trace of 3 layers of 5 experts given, but there are 3 layers of 6");
}

TEST(Scheduler, records_the_needs_between_on_and_off) {
  Scheduler scheduler = make(2, 4, 4);
  run(scheduler, 0, {1});
  scheduler.record(true);
  run(scheduler, 1, {2, 3});
  scheduler.record(false);
  run(scheduler, 0, {0});
  ASSERT_EQ(scheduler.recorded().remaining(), 1u);
  EXPECT_EQ(scheduler.recorded().upcoming(0).layer, 1);
  scheduler.record(true);
  EXPECT_EQ(scheduler.recorded().remaining(), 0u);
}

TEST(Scheduler, allocates_nothing_after_construction) {
  Scheduler scheduler = make(3, 8, 6);
  std::vector<ReadyExpert> ready;
  ready.reserve(8);
  const Experts whole = all_of(8);
  const Experts few{1, 5};
  const std::size_t before = allocation_count();
  for (int pass = 0; pass < 4; ++pass) {
    for (std::uint16_t layer = 0; layer < 3; ++layer) {
      const Experts& experts = pass % 2 == 0 ? whole : few;
      scheduler.need(layer, experts);
      for (std::size_t computed = 0; computed < experts.size();) {
        if (const auto fill = scheduler.next_fill()) scheduler.filled(fill->slot);
        ready.clear();
        scheduler.take_ready(ready);
        for (const ReadyExpert& each : ready) scheduler.computed(each.expert);
        computed += ready.size();
      }
    }
    scheduler.end_iteration();
  }
  EXPECT_EQ(allocation_count() - before, 0u);
}

}  // namespace
}  // namespace spmoe
