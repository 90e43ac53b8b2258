#include "schedule/scheduler.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "allocation_counter.hpp"
#include "base/error.hpp"
#include "message_of.hpp"
#include "policy_names.hpp"
#include "schedule/policies.hpp"
#include "scheduler_driver.hpp"

namespace spmoe {
namespace {

TEST(Scheduler, a_miss_becomes_a_demand_and_is_ready_when_it_has_arrived) {
  Scheduler scheduler = make(2, 4, 2);
  scheduler.access(1, Experts{3});
  const auto fill = scheduler.next_fill();
  ASSERT_TRUE(fill);
  EXPECT_EQ(fill->expert, (ExpertId{1, 3}));
  EXPECT_EQ(fill->kind, FillKind::demand);
  EXPECT_EQ(take(scheduler), Experts{});
  EXPECT_EQ(scheduler.fills().resident_count(), 0u);
  scheduler.progress(fill->slot, FillOutcome::arrived);
  std::vector<ReadyExpert> ready;
  scheduler.take_ready(ready);
  ASSERT_EQ(ready.size(), 1u);
  EXPECT_EQ(ready[0].expert, 3);
  EXPECT_EQ(ready[0].slot, fill->slot);
  EXPECT_EQ(scheduler.fills().resident_count(), 1u);
  scheduler.computed(3);
}

TEST(Scheduler, what_is_issued_is_ready_and_stays_until_it_has_arrived) {
  Scheduler scheduler = make(2, 4, 1);
  scheduler.access(0, Experts{1});
  const SlotIndex slot = scheduler.next_fill().value().slot;
  scheduler.progress(slot, FillOutcome::issued);
  std::vector<ReadyExpert> ready;
  scheduler.take_ready(ready);
  ASSERT_EQ(ready.size(), 1u);
  EXPECT_TRUE(ready[0].in_flight);
  EXPECT_TRUE(scheduler.fills().read_before_arrival());
  scheduler.computed(1);
  scheduler.access(1, Experts{0});
  EXPECT_FALSE(scheduler.next_fill()) << "its bytes are still being written";
  scheduler.progress(slot, FillOutcome::arrived);
  EXPECT_FALSE(scheduler.fills().read_before_arrival());
  EXPECT_EQ(take(scheduler), Experts{});
  EXPECT_TRUE(scheduler.next_fill());
}

TEST(Scheduler, a_fill_that_fails_behind_compute_is_reported_and_its_slot_given_up) {
  for (const bool taken : {false, true}) {
    for (const bool computed : {false, true}) {
      if (computed && !taken) continue;
      Scheduler scheduler = make(1, 4, 1);
      scheduler.access(0, Experts{1});
      const SlotIndex slot = scheduler.next_fill().value().slot;
      scheduler.progress(slot, FillOutcome::issued);
      EXPECT_EQ(taken ? take(scheduler) : Experts{1}, Experts{1});
      if (computed) scheduler.computed(1);
      EXPECT_EQ(scheduler.progress(slot, FillOutcome::failed, 0),
                computed ? FailureScope::results : FailureScope::access);
      EXPECT_FALSE(scheduler.fills().read_before_arrival());
      EXPECT_EQ(taken ? Experts{1} : take(scheduler), Experts{1});
      if (!computed) scheduler.computed(1);
      scheduler.access(0, Experts{1});
      EXPECT_EQ(scheduler.fills().stats()[0].misses, 2u) << "half of it is nothing";
      EXPECT_TRUE(scheduler.next_fill());
    }
  }
}

TEST(Scheduler, ready_experts_come_in_the_order_in_which_they_arrived) {
  Scheduler scheduler = make(1, 4, 4);
  run(scheduler, 0, {2});
  scheduler.access(0, Experts{0, 1, 2, 3});
  const auto fills = start(scheduler);
  ASSERT_EQ(fills.size(), 3u);
  for (const std::size_t i : {2U, 0U, 1U}) scheduler.progress(fills[i].slot, FillOutcome::arrived);
  EXPECT_EQ(take(scheduler), (Experts{2, 3, 0, 1}));  // the resident first
  EXPECT_EQ(take(scheduler), Experts{});
}

TEST(Scheduler, counts_hits_late_ones_and_misses) {
  Scheduler scheduler = make(2, 4, 8);
  run(scheduler, 0, all_of(4));  // reads layer 1 ahead
  const auto ahead = start(scheduler);
  ASSERT_EQ(ahead.size(), 4u);
  scheduler.progress(ahead[0].slot, FillOutcome::arrived);
  scheduler.progress(ahead[1].slot, FillOutcome::failed, 0);
  scheduler.access(1, Experts{0, 1, 2});
  const LayerStats& stats = scheduler.fills().stats()[1];
  EXPECT_EQ(stats.hits, 1u);
  EXPECT_EQ(stats.misses, 1u);
  EXPECT_EQ(stats.late, 1u);
}

TEST(Scheduler, counts_what_a_layer_needs_again) {
  Scheduler scheduler = make(2, 4, 8);
  run(scheduler, 0, {0, 1});
  run(scheduler, 1, {0, 1});
  run(scheduler, 0, {1, 2});
  run(scheduler, 0, {1, 2, 3});
  run(scheduler, 0, {0});
  EXPECT_EQ(scheduler.fills().stats()[0].repeated, 3u);
  EXPECT_EQ(scheduler.fills().stats()[1].repeated, 0u);
}

TEST(Scheduler, predictions_are_counted_by_layer) {
  Scheduler scheduler = make(2, 4, 4);
  const std::vector<float> scores(4, 0.25F);
  scheduler.predict(1, scores);
  scheduler.predict(1, scores);
  EXPECT_EQ(scheduler.fills().stats()[0].predictions, 0u);
  EXPECT_EQ(scheduler.fills().stats()[1].predictions, 2u);
}

TEST(Scheduler, a_leased_expert_is_never_evicted) {
  Scheduler scheduler = make(1, 4, 2);
  scheduler.access(0, Experts{0, 1, 2});
  for (const Fill& fill : start(scheduler)) scheduler.progress(fill.slot, FillOutcome::arrived);
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
  scheduler.access(0, Experts{0, 1, 2});
  const auto fills = start(scheduler);
  ASSERT_EQ(fills.size(), 2u);
  EXPECT_NE(fills[0].slot, fills[1].slot);
  scheduler.abandon_access();
  scheduler.access(0, Experts{3});
  EXPECT_FALSE(scheduler.next_fill());
  scheduler.progress(fills[1].slot, FillOutcome::arrived);
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
  EXPECT_EQ(scheduler.fills().stats()[0].hits, 4u);
}

TEST(Scheduler, demands_start_before_every_prefetch) {
  Scheduler scheduler = make(3, 4, 12);
  run(scheduler, 0, all_of(4));
  scheduler.access(2, Experts{1, 3});
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
  EXPECT_EQ(finish_prefetches(scheduler), (std::vector<ExpertId>{{1, 0}, {1, 1}, {1, 2}, {1, 3}}));
  run(scheduler, 2, all_of(4));  // there is no layer 3
  EXPECT_FALSE(scheduler.next_fill());
}

TEST(Scheduler, read_ahead_takes_no_leased_slot_and_none_that_was_read_ahead) {
  Scheduler scheduler = make(2, 4, 5);
  scheduler.access(0, all_of(4));
  for (const Fill& fill : start(scheduler, FillKind::demand))
    scheduler.progress(fill.slot, FillOutcome::arrived);
  EXPECT_EQ(take(scheduler).size(), 4u);
  EXPECT_EQ(finish_prefetches(scheduler), (std::vector<ExpertId>{{1, 0}}));  // the spare slot
  scheduler.computed(2);
  EXPECT_EQ(finish_prefetches(scheduler), (std::vector<ExpertId>{{1, 1}}));
  for (const std::uint16_t expert : Experts{0, 1, 3}) scheduler.computed(expert);
  EXPECT_EQ(finish_prefetches(scheduler), (std::vector<ExpertId>{{1, 2}, {1, 3}}));
  EXPECT_EQ(run(scheduler, 1, all_of(4)), 0u);
  EXPECT_EQ(scheduler.fills().stats()[1].hits, 4u);
}

TEST(Scheduler, read_ahead_keeps_what_the_next_layer_has_already) {
  Scheduler scheduler = make(2, 4, 4);
  run(scheduler, 1, {0, 1});
  run(scheduler, 0, {0, 1});
  run(scheduler, 0, {0, 1});  // layer 1 was used longest ago
  scheduler.access(0, all_of(4));
  EXPECT_EQ(take(scheduler), (Experts{0, 1}));
  for (const std::uint16_t expert : Experts{0, 1}) scheduler.computed(expert);
  for (int i = 0; i < 2; ++i) {
    const auto fill = scheduler.next_fill(FillKind::demand);
    ASSERT_TRUE(fill);
    scheduler.progress(fill->slot, FillOutcome::arrived);
    for (const std::uint16_t expert : take(scheduler)) scheduler.computed(expert);
  }
  EXPECT_EQ(finish_prefetches(scheduler), (std::vector<ExpertId>{{1, 2}, {1, 3}}));
  EXPECT_EQ(run(scheduler, 1, all_of(4)), 0u);
  EXPECT_EQ(scheduler.fills().stats()[1].hits, 4u);
}

TEST(Scheduler, a_demand_may_take_a_slot_that_was_read_ahead_when_there_is_no_other) {
  Scheduler scheduler = make(3, 4, 4);
  run(scheduler, 0, all_of(4));
  EXPECT_EQ(finish_prefetches(scheduler).size(), 4u);
  scheduler.access(2, Experts{0});
  const auto fill = scheduler.next_fill();
  ASSERT_TRUE(fill);
  EXPECT_EQ(fill->expert, (ExpertId{2, 0}));
}

TEST(Scheduler, what_was_read_ahead_loses_its_protection_with_the_iteration) {
  Scheduler scheduler = make(3, 2, 3);
  run(scheduler, 1, {0});
  run(scheduler, 0, all_of(2));  // keeps the expert of layer 1, which is the oldest
  const auto oldest_leaves = [&] {
    scheduler.access(2, Experts{0});
    const auto fill = scheduler.next_fill(FillKind::demand);
    scheduler.abandon_access();
    scheduler.progress(fill.value().slot, FillOutcome::failed, 0);
    return fill->slot == 0;
  };
  EXPECT_FALSE(oldest_leaves());
  run(scheduler, 0, {0, 1});
  scheduler.end_iteration();
  EXPECT_FALSE(scheduler.next_fill());  // and what had not started is cancelled
  EXPECT_TRUE(oldest_leaves());
}

TEST(Scheduler, an_access_cancels_the_predictions_of_its_layer_that_it_does_not_want) {
  Scheduler scheduler = make(2, 4, 8);
  run(scheduler, 0, all_of(4));
  scheduler.access(1, Experts{2});
  const auto fills = start(scheduler);
  ASSERT_EQ(fills.size(), 1u);
  EXPECT_EQ(fills[0].expert, (ExpertId{1, 2}));
  EXPECT_EQ(fills[0].kind, FillKind::demand);
}

TEST(Scheduler, a_failed_fill_that_the_access_waits_for_is_reported_and_leaves_the_slot_empty) {
  Scheduler scheduler = make(1, 4, 1);
  scheduler.access(0, Experts{0, 1});
  const auto fill = scheduler.next_fill();
  ASSERT_TRUE(fill);
  EXPECT_EQ(scheduler.progress(fill->slot, FillOutcome::failed, 0), FailureScope::access);
  scheduler.abandon_access();
  EXPECT_FALSE(scheduler.next_fill());
  EXPECT_EQ(total(scheduler).demand_bytes, 0u);
  EXPECT_EQ(run(scheduler, 0, {0, 1}), 2u);  // it is read again
}

TEST(Scheduler, a_failed_prefetch_that_is_needed_becomes_a_demand) {
  Scheduler scheduler = make(2, 4, 8);
  run(scheduler, 0, all_of(4));
  const auto fills = start(scheduler);
  ASSERT_EQ(fills.size(), 4u);
  EXPECT_EQ(scheduler.progress(fills[0].slot, FillOutcome::failed, 0), FailureScope::nothing);
  scheduler.access(1, Experts{1});
  EXPECT_EQ(scheduler.progress(fills[3].slot, FillOutcome::failed, 0), FailureScope::nothing);
  EXPECT_EQ(scheduler.progress(fills[1].slot, FillOutcome::failed, 0), FailureScope::nothing);
  const auto again = start(scheduler);
  ASSERT_EQ(again.size(), 1u);
  EXPECT_EQ(again[0].expert, (ExpertId{1, 1}));
  EXPECT_EQ(again[0].kind, FillKind::demand);
  EXPECT_EQ(scheduler.progress(again[0].slot, FillOutcome::failed, 0), FailureScope::access);
  scheduler.abandon_access();
  EXPECT_EQ(scheduler.progress(fills[2].slot, FillOutcome::failed, 0), FailureScope::nothing);
  EXPECT_EQ(run(scheduler, 1, all_of(4)), 4u);
}

TEST(Scheduler, an_abandoned_access_ends_its_leases_and_cancels_its_demands) {
  Scheduler scheduler = make(1, 8, 2);
  scheduler.access(0, Experts{0, 1, 2, 3});
  const auto fills = start(scheduler);
  ASSERT_EQ(fills.size(), 2u);
  scheduler.progress(fills[0].slot, FillOutcome::arrived);
  scheduler.abandon_access();
  EXPECT_EQ(take(scheduler), Experts{});
  scheduler.progress(fills[1].slot, FillOutcome::arrived);  // arrives for nobody
  EXPECT_EQ(take(scheduler), Experts{});
  EXPECT_FALSE(scheduler.next_fill());
  EXPECT_EQ(scheduler.fills().resident_count(), 2u);
  EXPECT_EQ(run(scheduler, 0, {4, 5}), 2u);  // both slots may be evicted
  EXPECT_EQ(total(scheduler).demand_bytes, 3 * blob_bytes);
  EXPECT_EQ(total(scheduler).prefetch_bytes, blob_bytes);
}

TEST(Scheduler, a_prompt_is_read_ahead_whatever_the_policy_admits) {
  for (const char* policy : {"on-demand", "sp-moe", "horizon", "oracle"}) {
    Scheduler scheduler{{2, 4, 4, blob_bytes}, {policy, "auto"}};
    run(scheduler, 0, all_of(4));  // fills every slot
    EXPECT_EQ(finish_prefetches(scheduler).size(), 4u) << policy;
    EXPECT_EQ(scheduler.fills().stats()[1].prefetch_bytes, 4 * blob_bytes) << policy;
  }
}

TEST(Scheduler, a_prefetched_byte_is_used_or_wasted) {
  Scheduler scheduler = make(2, 4, 4);
  run(scheduler, 0, all_of(4));
  EXPECT_EQ(finish_prefetches(scheduler).size(), 4u);
  EXPECT_EQ(scheduler.fills().stats()[1].prefetch_bytes, 4 * blob_bytes);
  EXPECT_EQ(scheduler.fills().stats()[1].prefetch_used_bytes, 0u);
  run(scheduler, 1, {1, 3});
  run(scheduler, 1, {1, 3});  // used once all the same
  run(scheduler, 0, all_of(4));
  EXPECT_EQ(scheduler.fills().stats()[1].prefetch_bytes, 4 * blob_bytes);
  EXPECT_EQ(scheduler.fills().stats()[1].prefetch_used_bytes, 2 * blob_bytes);
  EXPECT_EQ(scheduler.fills().stats()[1].demand_bytes, 0u);
  EXPECT_EQ(scheduler.fills().stats()[0].demand_bytes, 8 * blob_bytes);
}

TEST(Scheduler, a_layer_that_does_not_exist_is_refused_unchanged) {
  Scheduler scheduler = make(2, 4, 4);
  EXPECT_THROW(scheduler.access(2, Experts{0}), std::out_of_range);
  EXPECT_THROW(scheduler.predict(2, {}), std::out_of_range);
  EXPECT_FALSE(scheduler.next_fill());
  EXPECT_EQ(run(scheduler, 0, {0}), 1u);
}

TEST(Scheduler, recall_counts_the_needed_experts_that_were_critical) {
  Scheduler scheduler{{2, 6, 12, blob_bytes, /*experts_per_token=*/2}};
  const std::vector<float> scores{0.5F, 0.4F, 0.3F, 0.2F, 0.1F, 0.0F};
  scheduler.predict(0, scores);
  run(scheduler, 0, {0, 2, 5});
  const LayerStats& stats = scheduler.fills().stats()[0];
  EXPECT_EQ(stats.predicted_accesses, 3u);
  EXPECT_EQ(stats.recalled, 1u);     // 0, of 0 and 1
  EXPECT_EQ(stats.recalled_2k, 2u);  // 0 and 2, of 0 to 3
  EXPECT_EQ(stats.critical, 2u);
  run(scheduler, 0, {0, 1});  // not predicted again
  EXPECT_EQ(stats.predicted_accesses, 3u);
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
  EXPECT_EQ(scheduler.fills().stats()[1].predicted_accesses, 4u);
  EXPECT_EQ(scheduler.fills().stats()[1].recalled, 3u);
  EXPECT_EQ(scheduler.fills().stats()[1].critical, 3u);
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
  EXPECT_EQ(finish_prefetches(scheduler),
            (std::vector<ExpertId>{{0, 0}, {0, 2}, {1, 0}, {1, 2}, {2, 0}, {2, 2}}));
  for (std::uint16_t layer = 0; layer < 3; ++layer) EXPECT_EQ(run(scheduler, layer, {0, 2}), 0u);
  EXPECT_EQ(total(scheduler).hits, 6u);
  EXPECT_EQ(total(scheduler).prefetch_used_bytes, 6 * blob_bytes);
}

TEST(Scheduler, a_plan_takes_the_place_of_what_waits_and_is_served_in_its_order) {
  Scheduler scheduler{{4, 4, 6, blob_bytes}, {"sp-moe"}};
  scheduler.predict(1, std::vector{1.5F, 0.0F, 0.0F, 0.0F});
  scheduler.predict(std::vector<ExpertId>{{3, 2}, {1, 1}, {3, 2}, {2, 0}});
  EXPECT_EQ(finish_prefetches(scheduler), (std::vector<ExpertId>{{3, 2}, {1, 1}, {2, 0}}));
  EXPECT_EQ(run(scheduler, 1, {1}), 0u);
  EXPECT_EQ(total(scheduler).hits, 1u);
  EXPECT_EQ(total(scheduler).prefetch_used_bytes, blob_bytes);
  scheduler.predict(std::vector<ExpertId>{{2, 3}});
  scheduler.predict({});
  EXPECT_TRUE(finish_prefetches(scheduler).empty());
}

TEST(Scheduler, a_plan_leaves_the_next_layer_of_a_prompt_to_be_read_ahead) {
  Scheduler scheduler = make(3, 2, 6);
  scheduler.access(0, all_of(2));
  scheduler.predict(std::vector<ExpertId>{{2, 1}});
  std::vector<ExpertId> filled;
  for (const Fill& fill : start(scheduler)) filled.push_back(fill.expert);
  EXPECT_EQ(filled, (std::vector<ExpertId>{{0, 0}, {0, 1}, {1, 0}, {1, 1}, {2, 1}}));
}

TEST(Scheduler, a_demand_takes_of_what_was_prefetched_for_this_pass_what_is_needed_last) {
  for (const std::string& eviction : eviction_policy_names()) {
    if (eviction_policy({.eviction = eviction}).replays) continue;  // knows no routing here
    SCOPED_TRACE(eviction);
    Scheduler scheduler{{4, 4, 3, blob_bytes}, {"sp-moe", eviction}};
    for (const std::uint16_t layer : Experts{1, 3, 2}) {
      scheduler.predict(layer, std::vector{1.5F, 0.0F, 0.0F, 0.0F});
    }
    ASSERT_EQ(finish_prefetches(scheduler).size(), 3u);
    EXPECT_EQ(run(scheduler, 0, {3}), 1u);
    EXPECT_EQ(run(scheduler, 1, {0}), 0u);
    EXPECT_EQ(run(scheduler, 2, {0}), 0u);
    EXPECT_EQ(run(scheduler, 3, {0}), 1u);
  }
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
  scheduler.foresight().replay(std::move(trace));
  for (std::uint16_t need = 0; need < 60; ++need) {
    finish_prefetches(scheduler);
    run(scheduler, static_cast<std::uint16_t>(need % 3), needs[need]);
    if (need % 3 == 2) scheduler.end_iteration();
  }
  const LayerStats sum = total(scheduler);
  EXPECT_EQ(sum.misses, 2u);  // of the first need, before which it is not asked
  EXPECT_EQ(sum.prefetch_used_bytes, sum.prefetch_bytes);
}

TEST(Scheduler, a_trace_of_another_model_is_refused) {
  Scheduler scheduler = make(3, 6, 2);
  EXPECT_EQ(message_of<InvalidArgument>([&] { scheduler.foresight().replay(RoutingTrace{3, 5}); }),
            "a trace of 3 layers of 5 experts given, but there are 3 layers of 6");
}

TEST(Scheduler, records_the_needs_between_on_and_off) {
  Scheduler scheduler = make(2, 4, 4);
  run(scheduler, 0, {1});
  scheduler.foresight().record(true);
  run(scheduler, 1, {2, 3});
  scheduler.foresight().record(false);
  run(scheduler, 0, {0});
  ASSERT_EQ(scheduler.foresight().recorded().remaining(), 1u);
  EXPECT_EQ(scheduler.foresight().recorded().upcoming(0).layer, 1);
  scheduler.foresight().record(true);
  EXPECT_EQ(scheduler.foresight().recorded().remaining(), 0u);
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
      scheduler.access(layer, experts);
      for (std::size_t computed = 0; computed < experts.size();) {
        if (const auto fill = scheduler.next_fill())
          scheduler.progress(fill->slot, FillOutcome::arrived);
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
