#include "runtime/routed_rows.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <set>
#include <vector>

#include "allocation_counter.hpp"
#include "base/error.hpp"
#include "message_of.hpp"

namespace spmoe {
namespace {

using Rows = std::vector<std::uint32_t>;

Rows token_rows(const RoutedRows& rows, std::uint16_t expert) {
  const auto span = rows.task(expert, nullptr).token_rows;
  return {span.begin(), span.end()};
}
Rows out_rows(const RoutedRows& rows, std::uint16_t expert) {
  const auto span = rows.task(expert, nullptr).out_rows;
  return {span.begin(), span.end()};
}

TEST(RoutedRows, groups_the_rows_of_each_expert_in_the_order_of_tokens) {
  RoutedRows rows{5};
  const std::vector<std::int64_t> index{3, 0,   // token 0
                                        0, 4,   // token 1
                                        3, 4};  // token 2
  rows.assign(index, 2);
  EXPECT_EQ(std::vector(rows.experts().begin(), rows.experts().end()),
            (std::vector<std::uint16_t>{0, 3, 4}));
  EXPECT_EQ(token_rows(rows, 0), (Rows{0, 1}));
  EXPECT_EQ(out_rows(rows, 0), (Rows{1, 2}));
  EXPECT_EQ(token_rows(rows, 3), (Rows{0, 2}));
  EXPECT_EQ(out_rows(rows, 3), (Rows{0, 4}));
  EXPECT_EQ(token_rows(rows, 4), (Rows{1, 2}));
  EXPECT_EQ(out_rows(rows, 4), (Rows{3, 5}));
  EXPECT_EQ(token_rows(rows, 1), Rows{});
}

TEST(RoutedRows, a_task_runs_over_the_blob_it_is_given) {
  RoutedRows rows{1};
  rows.assign(std::vector<std::int64_t>{0}, 1);
  const std::byte blob{};
  EXPECT_EQ(rows.task(0, &blob).blob, &blob);
}

TEST(RoutedRows, no_tokens_need_no_experts) {
  RoutedRows rows{3};
  rows.assign(std::vector<std::int64_t>{2, 1}, 2);
  rows.assign({}, 2);
  EXPECT_TRUE(rows.experts().empty());
  EXPECT_EQ(token_rows(rows, 2), Rows{});
}

TEST(RoutedRows, an_expert_chosen_twice_by_a_token_makes_both_rows) {
  RoutedRows rows{3};
  rows.assign(std::vector<std::int64_t>{1, 1}, 2);
  EXPECT_EQ(token_rows(rows, 1), (Rows{0, 0}));
  EXPECT_EQ(out_rows(rows, 1), (Rows{0, 1}));
}

TEST(RoutedRows, an_index_outside_the_layer_is_named_with_its_position) {
  RoutedRows rows{4};
  const auto assign = [&](std::vector<std::int64_t> index) {
    return message_of<InvalidArgument>([&] { rows.assign(index, 2); });
  };
  EXPECT_EQ(assign({0, 1, 2, 4}), "top_k_index[1, 1] is 4, but the layer has experts 0 to 3");
  EXPECT_EQ(assign({-1, 1}), "top_k_index[0, 0] is -1, but the layer has experts 0 to 3");
  EXPECT_EQ(assign({0, std::int64_t{1} << 32}),
            "top_k_index[0, 1] is 4294967296, but the layer has experts 0 to 3");
  rows.assign(std::vector<std::int64_t>{3, 2}, 2);  // the next call is not harmed
  EXPECT_EQ(out_rows(rows, 3), Rows{0});
}

TEST(RoutedRows, every_choice_of_every_token_is_in_one_task) {
  for (const std::uint32_t seed : {51U, 52U, 53U}) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    std::mt19937 random{seed};
    RoutedRows rows{16};
    for (int round = 0; round < 50; ++round) {
      const auto k = static_cast<std::uint32_t>(1 + random() % 4);
      std::vector<std::int64_t> index(std::size_t{random() % 40} * k);
      std::ranges::generate(index, [&] { return random() % 16; });
      rows.assign(index, k);
      std::size_t total = 0;
      for (const std::uint16_t expert : rows.experts()) {
        const Rows tokens = token_rows(rows, expert);
        const Rows outs = out_rows(rows, expert);
        ASSERT_EQ(tokens.size(), outs.size());
        ASSERT_TRUE(std::ranges::is_sorted(outs));
        for (std::size_t i = 0; i < outs.size(); ++i) {
          ASSERT_EQ(index[outs[i]], expert);
          ASSERT_EQ(tokens[i], outs[i] / k);
        }
        total += outs.size();
      }
      ASSERT_EQ(total, index.size());
      ASSERT_EQ(rows.experts().size(), std::set(index.begin(), index.end()).size());
    }
  }
}

TEST(RoutedRows, allocates_nothing_once_it_has_seen_the_largest_call) {
  RoutedRows rows{8};
  const std::vector<std::int64_t> index{7, 0, 3, 1, 2, 2, 6, 5};
  rows.assign(index, 2);
  const std::size_t before = allocation_count();
  rows.assign(index, 1);
  rows.assign({index.data(), 2}, 2);
  rows.assign({}, 2);
  rows.assign(index, 4);
  EXPECT_EQ(allocation_count() - before, 0u);
}

}  // namespace
}  // namespace spmoe
