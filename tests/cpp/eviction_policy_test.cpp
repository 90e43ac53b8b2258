#include "schedule/eviction_policy.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <list>
#include <memory>
#include <optional>
#include <random>
#include <utility>
#include <vector>

namespace spmoe {
namespace {

using Factory =
    std::function<std::unique_ptr<EvictionPolicy>(SlotIndex slot_count, std::uint16_t layer_count)>;
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

/// A cache of `slot_count` slots under `policy`, which is shown every use of `trace`. Calls
/// `on_victim` with each victim's candidates. Returns the number of hits.
template <class OnVictim>
std::size_t replay(EvictionPolicy& policy, SlotIndex slot_count, const Trace& trace,
                   OnVictim on_victim) {
  std::vector<Candidate> cached;
  std::size_t hits = 0;
  for (const ExpertId expert : trace) {
    auto held = std::ranges::find(cached, expert, &Candidate::resident);
    if (held != cached.end()) {
      ++hits;
    } else if (cached.size() < slot_count) {
      cached.push_back({static_cast<SlotIndex>(cached.size()), expert});
      held = cached.end() - 1;
      policy.on_fill(held->slot, expert);
    } else {
      const SlotIndex victim = policy.victim(cached, expert.layer);
      on_victim(cached, victim);
      held = std::ranges::find(cached, victim, &Candidate::slot);
      if (held == cached.end()) return hits;
      held->resident = expert;
      policy.on_fill(held->slot, expert);
    }
    policy.on_use(held->slot);
  }
  return hits;
}

std::size_t hits_of(EvictionPolicy& policy, SlotIndex slot_count, const Trace& trace) {
  return replay(policy, slot_count, trace, [](const auto&, SlotIndex) {});
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
class EvictionPolicyContract : public ::testing::TestWithParam<std::pair<const char*, Factory>> {
 protected:
  static std::unique_ptr<EvictionPolicy> make(SlotIndex slot_count) {
    return GetParam().second(slot_count, layer_count);
  }
};

TEST_P(EvictionPolicyContract, goes_by_its_name) { EXPECT_EQ(make(1)->name(), GetParam().first); }

TEST_P(EvictionPolicyContract, the_only_candidate_is_the_victim) {
  const auto policy = make(4);
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
    const auto policy = make(5);
    std::vector<Candidate> resident;
    for (SlotIndex slot = 0; slot < 5; ++slot) {
      resident.push_back({slot, {0, static_cast<std::uint16_t>(slot)}});
      policy->on_fill(slot, resident.back().resident);
    }
    for (int step = 0; step < 500; ++step) {
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
  const auto policy = make(4);
  const std::vector<Candidate> equal{{3, {1, 0}}, {1, {1, 0}}, {2, {1, 0}}};
  EXPECT_EQ(policy->victim(equal, 0), 1u);
}

TEST_P(EvictionPolicyContract, the_same_history_gives_the_same_victims) {
  std::mt19937 random{31};
  const Trace trace = random_trace(random);
  std::vector<SlotIndex> victims[2];
  for (auto& those : victims) {
    const auto policy = make(7);
    replay(*policy, 7, trace, [&](const auto&, SlotIndex victim) { those.push_back(victim); });
  }
  EXPECT_FALSE(victims[0].empty());
  EXPECT_EQ(victims[0], victims[1]);
}

TEST_P(EvictionPolicyContract, never_beats_belady) {
  for (std::uint32_t seed = 41; seed < 61; ++seed) {
    std::mt19937 random{seed};
    const Trace trace = random_trace(random);
    for (const SlotIndex slot_count : {2U, 5U, 9U, 16U, 24U}) {
      const auto policy = make(slot_count);
      EXPECT_LE(hits_of(*policy, slot_count, trace), belady_hits(slot_count, trace))
          << "seed " << seed << ", " << slot_count << " slots";
    }
  }
}

TEST_P(EvictionPolicyContract, evicts_nothing_while_all_experts_fit) {
  std::mt19937 random{62};
  const Trace trace = random_trace(random);
  const auto policy = make(layer_count * expert_count);
  EXPECT_EQ(hits_of(*policy, layer_count * expert_count, trace),
            belady_hits(layer_count * expert_count, trace));
}

INSTANTIATE_TEST_SUITE_P(all, EvictionPolicyContract,
                         ::testing::Values(std::pair{"lru",
                                                     Factory{[](SlotIndex slots, std::uint16_t) {
                                                       return make_lru(slots);
                                                     }}}),
                         [](const auto& test) { return test.param.first; });

TEST(Belady, keeps_what_is_used_again_soonest) {
  const ExpertId a{0, 0};
  const ExpertId b{0, 1};
  const ExpertId c{0, 2};
  // c takes the place of a, whose next use is the later one: only the last a is a second miss.
  EXPECT_EQ(belady_hits(2, {a, b, c, b, c, b, a}), 3u);
  EXPECT_EQ(hits_of(*make_lru(2), 2, {a, b, c, b, c, b, a}), 3u);
  EXPECT_EQ(belady_hits(2, {a, b, c, a, b, c}), 2u);
  EXPECT_EQ(hits_of(*make_lru(2), 2, {a, b, c, a, b, c}), 0u);  // a loop is its worst case
}

TEST(Lru, evicts_the_slot_whose_last_use_or_fill_is_longest_ago) {
  const auto policy = make_lru(3);
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
    EXPECT_EQ(hits_of(*make_lru(8), 8, trace), hits);
  }
}

}  // namespace
}  // namespace spmoe
