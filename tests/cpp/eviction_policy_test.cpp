#include "schedule/eviction/eviction_policy.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <list>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "message_of.hpp"
#include "policy_names.hpp"
#include "policy_world.hpp"
#include "schedule/policies.hpp"

namespace spmoe {
namespace {

using Trace = std::vector<ExpertId>;

constexpr std::uint16_t layer_count = 4;
constexpr std::uint16_t expert_count = 6;

/// Uses of experts by passes over the layers, some experts more popular than others.
Trace random_trace(std::mt19937& random) {
  Trace trace;
  for (int pass = 0; pass < 60; ++pass) {
    for (std::uint16_t layer = 0; layer < layer_count; ++layer) {
      for (int use = 0; use < 2; ++use) {
        const auto expert = std::min(random() % expert_count, random() % expert_count);
        trace.push_back({layer, static_cast<std::uint16_t>(expert)});
      }
    }
  }
  return trace;
}

SchedulerShape shape_of(SlotIndex slot_count) {
  return {layer_count, expert_count, slot_count, /*blob_bytes=*/1};
}

/// A policy by name, and all that it looks at.
struct Made {
  Made(const std::string& name, SlotIndex slot_count) : Made{name, shape_of(slot_count)} {}
  Made(const std::string& name, const SchedulerShape& shape)
      : world{shape}, policy{eviction_policy({.eviction = name}).make(world.view())} {}

  EvictionPolicy* operator->() const { return policy.get(); }

  PolicyWorld world;
  std::unique_ptr<EvictionPolicy> policy;
};

/// A cache of `slot_count` slots under the policy `name`, which is shown every use of `trace` and
/// knows it ahead of time. Calls `on_victim` with each victim. Returns the number of hits.
template <class OnVictim>
std::size_t replay(const std::string& name, SlotIndex slot_count, const Trace& trace,
                   OnVictim on_victim) {
  Made policy{name, slot_count};
  for (const ExpertId use : trace) policy.world.trace.append(use.layer, std::array{use.expert});
  std::vector<Candidate> cached;
  std::size_t hits = 0;
  std::uint16_t layer = 0;
  for (const ExpertId expert : trace) {
    if (expert.layer < layer) {
      policy->on_end_iteration();
      policy.world.forecast.end_iteration();
    }
    layer = expert.layer;
    policy.world.run(layer, std::array{expert.expert});
    auto held = std::ranges::find(cached, expert, &Candidate::resident);
    if (held != cached.end()) {
      ++hits;
    } else if (cached.size() < slot_count) {
      cached.push_back({static_cast<SlotIndex>(cached.size()), expert});
      held = cached.end() - 1;
      policy->on_fill(held->slot, expert);
    } else {
      const SlotIndex victim = policy->victim(cached, layer);
      on_victim(victim);
      held = std::ranges::find(cached, victim, &Candidate::slot);
      if (held == cached.end()) return hits;
      held->resident = expert;
      policy->on_fill(held->slot, expert);
    }
    policy->on_use(held->slot);
  }
  return hits;
}

std::size_t hits_of(const std::string& name, SlotIndex slot_count, const Trace& trace) {
  return replay(name, slot_count, trace, [](SlotIndex) {});
}

/// Belady's rule: the victim is used again latest. No policy has more hits on the same trace.
std::size_t belady_hits(SlotIndex slot_count, const Trace& trace) {
  std::vector<ExpertId> cached;
  std::size_t hits = 0;
  for (auto now = trace.begin(); now != trace.end(); ++now) {
    if (std::ranges::count(cached, *now) > 0) {
      ++hits;
    } else if (cached.size() < slot_count) {
      cached.push_back(*now);
    } else {
      const auto next_use = [&](ExpertId expert) { return std::find(now, trace.end(), expert); };
      *std::ranges::max_element(cached, {}, next_use) = *now;
    }
  }
  return hits;
}

// The contract of EvictionPolicy: every policy is run through every case below.
class EvictionPolicyContract : public ::testing::TestWithParam<std::string> {
 protected:
  static Made make(SlotIndex slot_count) { return Made{GetParam(), slot_count}; }
};

TEST_P(EvictionPolicyContract, the_only_candidate_is_the_victim) {
  const Made policy = make(4);
  for (SlotIndex slot = 0; slot < 4; ++slot) {
    policy->on_fill(slot, {2, static_cast<std::uint16_t>(slot)});
  }
  for (SlotIndex slot = 0; slot < 4; ++slot) {
    const std::vector<Candidate> only{{slot, {2, static_cast<std::uint16_t>(slot)}}};
    EXPECT_EQ(policy->victim(only, 0), slot);
  }
}

TEST_P(EvictionPolicyContract, the_victim_is_always_a_candidate) {
  for (const std::uint32_t seed : {21U, 22U, 23U}) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    std::mt19937 random{seed};
    const Made policy = make(5);
    std::vector<Candidate> resident;
    for (SlotIndex slot = 0; slot < 5; ++slot) {
      resident.push_back({slot, {0, static_cast<std::uint16_t>(slot)}});
      policy->on_fill(slot, resident.back().resident);
    }
    for (int step = 0; step < 500; ++step) {
      if (step % 16 == 0) policy->on_end_iteration();
      policy->on_use(static_cast<SlotIndex>(random() % 5));
      std::vector<Candidate> some;
      const std::size_t count = 1 + random() % 5;
      std::ranges::sample(resident, std::back_inserter(some), static_cast<std::ptrdiff_t>(count),
                          random);
      std::ranges::shuffle(some, random);
      const auto layer = static_cast<std::uint16_t>(random() % layer_count);
      const SlotIndex victim = policy->victim(some, layer);
      ASSERT_EQ(std::ranges::count(some, victim, &Candidate::slot), 1);
      resident[victim].resident = {layer, static_cast<std::uint16_t>(random() % expert_count)};
      policy->on_fill(victim, resident[victim].resident);
    }
  }
}

TEST_P(EvictionPolicyContract, equal_candidates_resolve_to_the_lowest_slot) {
  const Made policy = make(4);
  const std::vector<Candidate> equal{{3, {1, 0}}, {1, {1, 0}}, {2, {1, 0}}};
  EXPECT_EQ(policy->victim(equal, 0), 1u);
}

TEST_P(EvictionPolicyContract, the_same_history_gives_the_same_victims) {
  std::mt19937 random{31};
  const Trace trace = random_trace(random);
  std::vector<SlotIndex> victims[2];
  for (auto& those : victims) {
    replay(GetParam(), 7, trace, [&](SlotIndex victim) { those.push_back(victim); });
  }
  EXPECT_FALSE(victims[0].empty());
  EXPECT_EQ(victims[0], victims[1]);
}

TEST_P(EvictionPolicyContract, never_beats_belady) {
  for (std::uint32_t seed = 41; seed < 61; ++seed) {
    std::mt19937 random{seed};
    const Trace trace = random_trace(random);
    for (const SlotIndex slot_count : {2U, 5U, 9U, 16U, 24U}) {
      EXPECT_LE(hits_of(GetParam(), slot_count, trace), belady_hits(slot_count, trace))
          << "seed " << seed << ", " << slot_count << " slots";
    }
  }
}

TEST_P(EvictionPolicyContract, evicts_nothing_while_all_experts_fit) {
  std::mt19937 random{62};
  const Trace trace = random_trace(random);
  EXPECT_EQ(hits_of(GetParam(), layer_count * expert_count, trace),
            belady_hits(layer_count * expert_count, trace));
}

INSTANTIATE_TEST_SUITE_P(all, EvictionPolicyContract, ::testing::ValuesIn(eviction_policy_names()),
                         [](const auto& test) { return test_name(test.param); });

TEST(EvictionPolicies, an_unknown_name_is_refused_with_those_there_are) {
  const std::string message = message_of<InvalidArgument>([] { Made{"newest", 1}; });
  EXPECT_TRUE(message.starts_with("eviction policy \"newest\" asked; use one of lru, lfu, "))
      << message;
}

TEST(EvictionPolicies, auto_is_the_one_that_the_prefetch_policy_s_source_uses) {
  const auto name_for = [](const char* prefetch) {
    return eviction_policy({prefetch, "auto"}).name;
  };
  EXPECT_EQ(name_for("on-demand"), "lru");
  EXPECT_EQ(name_for("sp-moe"), "lru");
  EXPECT_EQ(name_for("activation-trace"), "activation-reuse");
  EXPECT_EQ(name_for("horizon"), "predicted-use");
  EXPECT_EQ(name_for("oracle"), "belady");
  EXPECT_THROW(static_cast<void>(name_for("psychic")), InvalidArgument);
}

TEST(EvictionPolicies, of_every_row_of_prefetching_are_there) {
  for (const PrefetchEntry& row : prefetch_policies()) {
    const PolicyNames own{.prefetch = std::string{row.name}};
    const PolicyNames best{.eviction = std::string{row.default_eviction}};
    EXPECT_EQ(eviction_policy(own).name, row.eviction);
    EXPECT_EQ(eviction_policy(best).name, row.default_eviction);
    EXPECT_EQ(eviction_policy(own).replays, row.replays);  // both are reported, or neither
  }
}

TEST(Belady, keeps_what_is_used_again_soonest) {
  const ExpertId a{0, 0};
  const ExpertId b{0, 1};
  const ExpertId c{0, 2};
  // c takes the place of a, whose next use is the later one: only the last a is a second miss.
  EXPECT_EQ(belady_hits(2, {a, b, c, b, c, b, a}), 3u);
  EXPECT_EQ(hits_of("lru", 2, {a, b, c, b, c, b, a}), 3u);
  EXPECT_EQ(belady_hits(2, {a, b, c, a, b, c}), 2u);
  EXPECT_EQ(hits_of("lru", 2, {a, b, c, a, b, c}), 0u);  // a loop is its worst case
}

TEST(Lru, evicts_the_slot_whose_last_use_or_fill_is_longest_ago) {
  const Made policy{"lru", 3};
  const std::vector<Candidate> all{{0, {0, 0}}, {1, {0, 1}}, {2, {0, 2}}};
  for (const Candidate& each : all) policy->on_fill(each.slot, each.resident);
  EXPECT_EQ(policy->victim(all, 0), 0u);
  policy->on_use(0);
  EXPECT_EQ(policy->victim(all, 0), 1u);
  policy->on_fill(1, {3, 3});
  EXPECT_EQ(policy->victim(all, 0), 2u);
  policy->on_use(2);
  EXPECT_EQ(policy->victim(all, 0), 0u);
  EXPECT_EQ(policy->victim({all.begin() + 1, all.end()}, 0), 1u);  // 0 is not on offer
}

TEST(Lru, agrees_with_a_list_in_the_order_of_use) {
  for (std::uint32_t seed = 71; seed < 76; ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    std::mt19937 random{seed};
    const Trace trace = random_trace(random);
    std::list<ExpertId> by_use;
    std::size_t hits = 0;
    for (const ExpertId expert : trace) {
      hits += std::erase(by_use, expert);
      by_use.push_back(expert);
      if (by_use.size() > 8) by_use.pop_front();
    }
    EXPECT_EQ(hits_of("lru", 8, trace), hits);
  }
}

TEST(Belady, has_as_many_hits_as_its_rule_allows) {
  for (std::uint32_t seed = 81; seed < 86; ++seed) {
    std::mt19937 random{seed};
    const Trace trace = random_trace(random);
    for (const SlotIndex slot_count : {2U, 7U, 16U}) {
      EXPECT_EQ(hits_of("belady", slot_count, trace), belady_hits(slot_count, trace))
          << "seed " << seed << ", " << slot_count << " slots";
    }
  }
}

TEST(Belady, knows_nothing_once_the_run_has_left_the_trace) {
  Made policy{"belady", 2};
  RoutingTrace& trace = policy.world.trace;
  trace.append(0, std::array<std::uint16_t, 1>{1});
  trace.append(0, std::array<std::uint16_t, 1>{0});
  const std::vector<Candidate> both{{0, {0, 0}}, {1, {0, 1}}};
  EXPECT_EQ(policy->victim(both, 0), 0u);
  trace.advance(0, std::array<std::uint16_t, 1>{1});
  EXPECT_EQ(policy->victim(both, 0), 1u);  // not used again
  trace.advance(0, std::array<std::uint16_t, 1>{3});
  EXPECT_EQ(policy->victim(both, 0), 0u);  // equals
}

TEST(Lfu, evicts_the_slot_used_least_often_since_it_was_filled) {
  const Made policy{"lfu", 3};
  const std::vector<Candidate> all{{0, {0, 0}}, {1, {0, 1}}, {2, {0, 2}}};
  for (const Candidate& each : all) policy->on_fill(each.slot, each.resident);
  for (const SlotIndex slot : {1U, 0U, 0U, 2U}) policy->on_use(slot);
  EXPECT_EQ(policy->victim(all, 0), 1u);  // one use, longer ago than that of slot 2
  policy->on_use(1);
  EXPECT_EQ(policy->victim(all, 0), 2u);
  policy->on_fill(0, {1, 0});
  EXPECT_EQ(policy->victim(all, 0), 0u);  // its uses were the former expert's
}

TEST(NextUse, evicts_the_layer_that_runs_again_latest) {
  const Made policy{"next-use", {/*layer_count=*/8, expert_count, /*slot_count=*/3, 1}};
  const std::vector<Candidate> all{{0, {3, 0}}, {1, {5, 0}}, {2, {3, 1}}};
  for (const Candidate& each : all) policy->on_fill(each.slot, each.resident);
  EXPECT_EQ(policy->victim(all, /*current_layer=*/4), 0u);  // layer 3 has just run
  policy->on_use(0);
  EXPECT_EQ(policy->victim(all, 4), 2u);  // the oldest use of a layer leaves first
  EXPECT_EQ(policy->victim(all, 3), 1u);
}

TEST(LeastStale, evicts_what_this_pass_left_behind_then_what_is_to_come_then_what_it_touched) {
  const Made policy{"least-stale", 4};
  const std::vector<Candidate> all{{0, {3, 0}}, {1, {2, 0}}, {2, {0, 0}}, {3, {1, 0}}};
  for (const Candidate& each : all) policy->on_fill(each.slot, each.resident);
  policy->on_end_iteration();
  policy->on_use(2);
  std::vector<SlotIndex> victims;
  for (std::vector<Candidate> left = all; !left.empty();) {
    victims.push_back(policy->victim(left, /*current_layer=*/2));
    std::erase_if(left, [&](const Candidate& each) { return each.slot == victims.back(); });
  }
  EXPECT_EQ(victims, (std::vector<SlotIndex>{3, 1, 0, 2}));
}

TEST(LeastStale, evicts_the_oldest_of_what_this_pass_touched) {
  const Made policy{"least-stale", 2};
  const std::vector<Candidate> both{{0, {1, 0}}, {1, {0, 0}}};
  policy->on_fill(0, {1, 0});
  policy->on_fill(1, {0, 0});
  EXPECT_EQ(policy->victim(both, 2), 0u);
  policy->on_use(0);
  EXPECT_EQ(policy->victim(both, 2), 1u);
}

TEST(PredictedUse, evicts_what_is_predicted_to_go_unused) {
  Made policy{"predicted-use", 2};
  UseForecast& forecast = policy.world.forecast;
  const std::vector<Candidate> both{{0, {1, 0}}, {1, {1, 1}}};
  forecast.predict(1, std::array{1.5F, 0.01F, 0.0F, 0.0F, 0.0F, 0.0F});
  EXPECT_EQ(policy->victim(both, 0), 1u);
  forecast.end_iteration();
  forecast.predict(1, std::array{0.01F, 1.5F, 0.0F, 0.0F, 0.0F, 0.0F});
  EXPECT_EQ(policy->victim(both, 0), 0u);
}

TEST(PredictedUse, goes_by_frequency_where_nothing_is_predicted) {
  Made policy{"predicted-use", 2};
  UseForecast& forecast = policy.world.forecast;
  const std::vector<std::uint32_t> one_row{1};
  for (int pass = 0; pass < 3; ++pass) {
    forecast.observe(1, std::array<std::uint16_t, 1>{0}, one_row, 1);
    forecast.end_iteration();
  }
  EXPECT_EQ(policy->victim(std::vector<Candidate>{{0, {1, 0}}, {1, {1, 1}}}, 0), 1u);
}

TEST(PredictedUse, of_equals_evicts_the_layer_that_runs_again_latest) {
  Made policy{"predicted-use", 2};
  UseForecast& forecast = policy.world.forecast;
  // A prompt that used none of them leaves nothing to distinguish them apart by.
  for (std::uint16_t layer = 0; layer < layer_count; ++layer) {
    forecast.observe(layer, {}, {}, 100);
  }
  const std::vector<Candidate> both{{0, {2, 0}}, {1, {1, 0}}};
  EXPECT_EQ(policy->victim(both, /*current_layer=*/2), 1u);
  EXPECT_EQ(policy->victim(both, /*current_layer=*/1), 0u);
}

TEST(ActivationReuse, evicts_the_lowest_share_of_the_nearest_past_request_and_late_layers_first) {
  Made policy{"activation-reuse", 2};
  PolicyWorld& world = policy.world;
  const std::vector<Candidate> late{{0, {1, 0}}, {1, {3, 0}}};
  EXPECT_EQ(policy->victim(late, 0), 1u);  // nothing is known
  world.run(1, std::array<std::uint16_t, 2>{0, 2});
  world.run(3, std::array<std::uint16_t, 1>{0});
  world.history.begin_request();
  world.run(1, std::array<std::uint16_t, 1>{2});
  const std::vector<Candidate> seen{{0, {1, 0}}, {1, {1, 1}}};
  EXPECT_EQ(policy->victim(seen, 0), 1u);  // the past request never used it
}

}  // namespace
}  // namespace spmoe
