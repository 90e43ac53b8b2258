#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <vector>

#include "layer_calls.hpp"
#include "policy_names.hpp"
#include "scheduler_driver.hpp"

namespace spmoe {
namespace {

struct Trial {
  std::vector<ExpertId> filled;
  LayerStats stats;
};

/// Some requests, drawn by a seed, every fill arriving at once.
Trial decode(Scheduler& scheduler, std::uint32_t seed) {
  constexpr std::uint16_t layers = 4;
  constexpr std::uint16_t experts = 8;
  std::mt19937 random{seed};
  Trial trial;
  for (int iteration = 0; iteration < 24; ++iteration) {
    if (iteration % 8 == 0) scheduler.begin_request();
    for (std::uint16_t layer = 0; layer < layers; ++layer) {
      std::vector<float> scores(experts);
      for (float& score : scores) score = static_cast<float>(random() % 100) / 50.0F;
      scheduler.predict(layer, scores);
      for (const ExpertId& expert : finish_prefetches(scheduler)) trial.filled.push_back(expert);
    }
    for (std::uint16_t layer = 0; layer < layers; ++layer) {
      const auto first = static_cast<std::uint16_t>(random() % experts);
      run(scheduler, layer, {first, static_cast<std::uint16_t>((first + 1) % experts)});
      for (const ExpertId& expert : finish_prefetches(scheduler)) trial.filled.push_back(expert);
    }
    scheduler.end_iteration();
  }
  trial.stats = total(scheduler);
  return trial;
}

TEST(Scheduler, in_place_of_a_used_one_behaves_as_a_new_one_does_under_every_policy) {
  for (const auto& prefetch : prefetch_policy_names()) {
    for (const auto& eviction : eviction_policy_names()) {
      SCOPED_TRACE(prefetch + " + " + eviction);
      const SchedulerShape shape{4, 8, 12, blob_bytes, 2};
      Scheduler fresh{shape, {prefetch, eviction}};
      Scheduler used{shape, {prefetch, eviction}};
      used.foresight().limits.cutoff_layer = 1;
      used.foresight().record(true);
      decode(used, 1);
      used = Scheduler{shape, {prefetch, eviction}};  // its policies move with what they look at
      EXPECT_EQ(used.fills().resident_count(), 0u);
      EXPECT_EQ(used.fills().queue().size(), 0u);
      EXPECT_EQ(used.foresight().limits.cutoff_layer, fresh.foresight().limits.cutoff_layer);
      EXPECT_EQ(used.foresight().recorded().remaining(), 0u);
      const Trial wanted = decode(fresh, 2);
      const Trial found = decode(used, 2);
      EXPECT_EQ(found.filled, wanted.filled);
      EXPECT_EQ(found.stats.hits, wanted.stats.hits);
      EXPECT_EQ(found.stats.misses, wanted.stats.misses);
      EXPECT_EQ(found.stats.recalled, wanted.stats.recalled);
      EXPECT_EQ(found.stats.repeated, wanted.stats.repeated);
      EXPECT_EQ(found.stats.prefetch_used_bytes, wanted.stats.prefetch_used_bytes);
    }
  }
}

TEST(Runtime, counts_and_computes_after_a_reset_as_a_new_one_does) {
  std::mt19937 random{40};
  std::vector<LayerCall> calls;
  for (int i = 0; i < 30; ++i) {
    calls.push_back(random_call(random, static_cast<std::uint16_t>(i % layer_count), 1));
  }
  RuntimeOptions some = options(6);
  some.trace_spans = 100;
  Runtime fresh{store(), some};
  Runtime used{store(), some};
  for (const LayerCall& call : calls) forward(used, call);
  used.end_iteration(3);
  used.reset();
  const RuntimeStats empty = used.stats();
  EXPECT_EQ(empty.resident_count, 0u);
  EXPECT_EQ(empty.link.bytes, 0u);
  EXPECT_EQ(empty.link.busy_s, 0.0);
  EXPECT_EQ(empty.iterations + empty.accepted + empty.layers[0].misses, 0u);
  EXPECT_EQ(empty.layers[0].compute_s + empty.layers[0].stall_s, 0.0);
  EXPECT_TRUE(used.spans().empty());
  for (const LayerCall& call : calls) EXPECT_EQ(forward(used, call), forward(fresh, call));
  EXPECT_EQ(used.stats().link.bytes, fresh.stats().link.bytes);
  EXPECT_EQ(used.stats().layers[1].misses, fresh.stats().layers[1].misses);
}

TEST(Runtime, a_reset_cancels_prefetches_in_flight) {
  RuntimeOptions some = options(6);
  some.policies.prefetch = "sp-moe";
  some.link.link_gbps = 1e-4;  // a blob takes 23 ms
  Runtime runtime{store(), some};
  std::vector<float> scores(expert_count, 0.0F);
  for (int expert = 0; expert < 4; ++expert) scores[static_cast<std::size_t>(expert)] = 2.0F;
  for (std::uint16_t layer = 0; layer < layer_count; ++layer) runtime.predict(layer, scores);
  runtime.reset();
  EXPECT_EQ(runtime.stats().queue_depth, 0u);
  EXPECT_EQ(runtime.stats().resident_count, 0u);
  EXPECT_EQ(runtime.stats().link.bytes, 0u);
  std::mt19937 random{41};
  const LayerCall call = random_call(random, 0, 1);
  Runtime other{store(), options(6)};
  EXPECT_EQ(forward(runtime, call), forward(other, call));
}

}  // namespace
}  // namespace spmoe
