#include "schedule/transfer_queue.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <utility>
#include <vector>

#include "allocation_counter.hpp"

namespace spmoe {
namespace {

constexpr auto demand = FillKind::demand;
constexpr auto prefetch = FillKind::prefetch;

using Entries = std::vector<std::pair<ExpertId, FillKind>>;

/// Entries that `queue` would serve, in order. Empties it.
Entries drain(TransferQueue& queue) {
  Entries served;
  for (; queue.size() > 0; queue.erase(0)) {
    served.emplace_back(queue[0].expert, queue[0].kind);
  }
  return served;
}

TEST(TransferQueue, serves_demands_before_prefetches_each_in_order_of_arrival) {
  TransferQueue queue{8};
  queue.push({0, 1}, prefetch);
  queue.push({1, 5}, demand);
  queue.push({0, 0}, prefetch);
  queue.push({1, 4}, demand);
  EXPECT_EQ(queue.size(), 4u);
  EXPECT_EQ(drain(queue),
            (Entries{{{1, 5}, demand}, {{1, 4}, demand}, {{0, 1}, prefetch}, {{0, 0}, prefetch}}));
}

TEST(TransferQueue, an_expert_that_waits_already_keeps_its_place) {
  TransferQueue queue{8};
  queue.push({0, 0}, demand);
  queue.push({0, 1}, demand);
  queue.push({0, 2}, prefetch);
  queue.push({0, 3}, prefetch);
  queue.push({0, 0}, demand);
  queue.push({0, 0}, prefetch);  // a demand stays one
  queue.push({0, 2}, prefetch);
  EXPECT_EQ(drain(queue),
            (Entries{{{0, 0}, demand}, {{0, 1}, demand}, {{0, 2}, prefetch}, {{0, 3}, prefetch}}));
}

TEST(TransferQueue, a_prefetch_that_is_demanded_moves_behind_the_demands) {
  TransferQueue queue{8};
  queue.push({0, 0}, prefetch);
  queue.push({0, 1}, prefetch);
  queue.push({0, 2}, demand);
  queue.push({0, 1}, demand);
  EXPECT_EQ(drain(queue), (Entries{{{0, 2}, demand}, {{0, 1}, demand}, {{0, 0}, prefetch}}));
}

TEST(TransferQueue, a_cancelled_expert_is_not_served) {
  TransferQueue queue{8};
  queue.push({0, 0}, demand);
  queue.push({0, 1}, prefetch);
  EXPECT_TRUE(queue.cancel({0, 0}));
  EXPECT_FALSE(queue.cancel({0, 0}));
  EXPECT_FALSE(queue.cancel({1, 1}));
  EXPECT_EQ(drain(queue), (Entries{{{0, 1}, prefetch}}));
}

TEST(TransferQueue, a_layer_is_cancelled_by_kind) {
  TransferQueue queue{8};
  queue.push({1, 0}, prefetch);
  queue.push({1, 1}, demand);
  queue.push({2, 0}, prefetch);
  queue.push({1, 2}, prefetch);
  EXPECT_EQ(queue.cancel_layer(1, prefetch), 2u);
  EXPECT_EQ(queue.cancel_layer(1, prefetch), 0u);
  EXPECT_EQ(drain(queue), (Entries{{{1, 1}, demand}, {{2, 0}, prefetch}}));
}

TEST(TransferQueue, prefetches_are_served_by_order_and_of_the_same_by_arrival) {
  TransferQueue queue{8};
  queue.push({0, 0}, prefetch, 2.5);
  queue.push({0, 1}, prefetch, -1);
  queue.push({0, 2}, prefetch, 2.5);
  queue.push({0, 3}, demand, 9);  // demands have none
  queue.push({0, 4}, prefetch);
  EXPECT_EQ(drain(queue), (Entries{{{0, 3}, demand},
                                   {{0, 1}, prefetch},
                                   {{0, 4}, prefetch},
                                   {{0, 0}, prefetch},
                                   {{0, 2}, prefetch}}));
}

TEST(TransferQueue, a_prefetch_whose_order_changes_moves) {
  TransferQueue queue{8};
  queue.push({0, 0}, prefetch, 1);
  queue.push({0, 1}, prefetch, 2);
  queue.push({0, 2}, prefetch, 3);
  queue.push({0, 2}, prefetch, 1);  // behind the one that had that order before
  queue.push({0, 1}, prefetch, 2);  // keeps its place
  EXPECT_EQ(drain(queue), (Entries{{{0, 0}, prefetch}, {{0, 2}, prefetch}, {{0, 1}, prefetch}}));
}

TEST(TransferQueue, a_demand_keeps_its_place_whatever_order_is_given) {
  TransferQueue queue{8};
  queue.push({0, 0}, demand, 5);
  queue.push({0, 1}, demand);
  queue.push({0, 0}, demand, 5);
  queue.push({0, 0}, demand, 7);
  queue.push({0, 0}, prefetch, -1);
  EXPECT_EQ(drain(queue), (Entries{{{0, 0}, demand}, {{0, 1}, demand}}));
}

TEST(TransferQueue, an_expert_is_cancelled_by_kind) {
  TransferQueue queue{8};
  queue.push({0, 0}, demand);
  queue.push({0, 1}, prefetch);
  EXPECT_FALSE(queue.cancel({0, 0}, prefetch));
  EXPECT_FALSE(queue.cancel({0, 1}, demand));
  EXPECT_EQ(queue.size(), 2u);
  EXPECT_TRUE(queue.cancel({0, 1}, prefetch));
  EXPECT_TRUE(queue.cancel({0, 0}, demand));
  EXPECT_EQ(queue.size(), 0u);
}

TEST(TransferQueue, all_of_a_kind_are_cancelled) {
  TransferQueue queue{8};
  queue.push({0, 0}, demand);
  queue.push({1, 1}, prefetch, 1);
  queue.push({2, 1}, prefetch, 2);
  queue.push({2, 2}, demand);
  EXPECT_EQ(queue.cancel_all(prefetch), 2u);
  EXPECT_EQ(queue.cancel_all(prefetch), 0u);
  EXPECT_EQ(drain(queue), (Entries{{{0, 0}, demand}, {{2, 2}, demand}}));
  queue.push({1, 1}, prefetch);
  queue.push({0, 0}, demand);
  EXPECT_EQ(queue.cancel_all(demand), 1u);
  EXPECT_EQ(drain(queue), (Entries{{{1, 1}, prefetch}}));
}

TEST(TransferQueue, agrees_with_two_plain_lists_and_allocates_nothing) {
  for (const std::uint32_t seed : {11U, 12U, 13U}) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    std::mt19937 random{seed};
    TransferQueue queue{12};
    std::vector<ExpertId> demands;
    std::vector<ExpertId> prefetches;
    for (int step = 0; step < 4000; ++step) {
      const ExpertId expert{static_cast<std::uint16_t>(random() % 3),
                            static_cast<std::uint16_t>(random() % 4)};
      const bool in_demands = std::ranges::count(demands, expert) > 0;
      const bool in_prefetches = std::ranges::count(prefetches, expert) > 0;
      const auto action = random() % 8;
      const std::size_t before = allocation_count();
      bool cancelled = false;
      if (action < 4) {
        queue.push(expert, action < 2 ? demand : prefetch);
      } else if (action == 4) {
        cancelled = queue.cancel(expert);
      } else if (action == 5) {
        queue.cancel_layer(expert.layer, prefetch);
      } else if (queue.size() > 0) {
        queue.erase(0);
      }
      ASSERT_EQ(allocation_count() - before, 0u);

      if (action < 2) {
        if (!in_demands) demands.push_back(expert);
        std::erase(prefetches, expert);
      } else if (action < 4) {
        if (!in_demands && !in_prefetches) prefetches.push_back(expert);
      } else if (action == 4) {
        ASSERT_EQ(cancelled, in_demands || in_prefetches);
        std::erase(demands, expert);
        std::erase(prefetches, expert);
      } else if (action == 5) {
        std::erase_if(prefetches, [&](ExpertId id) { return id.layer == expert.layer; });
      } else if (auto& first = demands.empty() ? prefetches : demands; !first.empty()) {
        first.erase(first.begin());
      }
      ASSERT_EQ(queue.size(), demands.size() + prefetches.size());
      if (queue.size() == 0) continue;
      ASSERT_EQ(queue[0].kind, demands.empty() ? prefetch : demand);
      ASSERT_EQ(queue[0].expert, demands.empty() ? prefetches.front() : demands.front());
    }
  }
}

}  // namespace
}  // namespace spmoe
