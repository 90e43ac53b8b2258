#include "schedule/prefetch/prefetch_policy.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "allocation_counter.hpp"
#include "base/error.hpp"
#include "message_of.hpp"
#include "policy_names.hpp"
#include "policy_world.hpp"
#include "schedule/policies.hpp"

namespace spmoe {
namespace {

using Experts = std::vector<std::uint16_t>;
using Ids = std::vector<ExpertId>;
using Scores = std::vector<float>;

constexpr auto draft = PredictionSource::draft;
constexpr auto target = PredictionSource::target;
constexpr std::uint64_t blob_bytes = 100;
constexpr std::uint16_t layer_count = 4;
constexpr std::uint16_t expert_count = 6;
constexpr SchedulerShape shape{layer_count, expert_count, /*slot_count=*/8, blob_bytes,
                               /*experts_per_token=*/2};

/// A prefetch policy by name, driven the way the scheduler does.
class Driven {
 public:
  explicit Driven(const std::string& name)
      : policy_{prefetch_policy({.prefetch = name}).make(world.view())} {}

  void predict(std::uint16_t layer, const Scores& scores, PredictionSource source = draft) {
    world.forecast.predict(layer, scores);
    policy_->on_prediction({layer, source, scores}, queue);
  }

  void access(std::uint16_t layer, const Experts& experts) {
    queue.cancel_layer(layer, FillKind::prefetch);
    world.run(layer, experts);
    policy_->on_access(layer, experts, queue);
  }

  void end_iteration() {
    world.forecast.end_iteration();
    policy_->on_end_iteration(queue);
  }

  PrefetchPolicy* operator->() const { return policy_.get(); }

  /// Entries that the queue would serve, in order.
  [[nodiscard]] Ids waiting() const {
    Ids experts;
    for (std::size_t i = 0; i < queue.size(); ++i) experts.push_back(queue[i].expert);
    return experts;
  }

  PolicyWorld world{shape};
  TransferQueue queue{std::size_t{layer_count} * expert_count};

 private:
  std::unique_ptr<PrefetchPolicy> policy_;
};

// The contract of PrefetchPolicy: every policy is run through every case below.
class PrefetchPolicyContract : public ::testing::TestWithParam<std::string> {
 protected:
  Driven policy{GetParam()};

  /// The queue holds experts of the model, as prefetches, each once.
  void check_queue() const {
    Ids waiting = policy.waiting();
    for (std::size_t i = 0; i < waiting.size(); ++i) {
      ASSERT_LT(waiting[i].layer, layer_count);
      ASSERT_LT(waiting[i].expert, expert_count);
      ASSERT_EQ(policy.queue[i].kind, FillKind::prefetch);
      ASSERT_TRUE(std::isfinite(policy.queue[i].order));
    }
    std::ranges::sort(waiting);
    ASSERT_EQ(std::ranges::adjacent_find(waiting), waiting.end());
  }
};

TEST_P(PrefetchPolicyContract, asks_for_experts_of_the_model_only_and_allocates_nothing) {
  constexpr float odd[] = {std::numeric_limits<float>::quiet_NaN(),
                           std::numeric_limits<float>::infinity(),
                           -std::numeric_limits<float>::infinity(),
                           std::numeric_limits<float>::max(),
                           -1.0F,
                           0.0F,
                           1.5F,
                           0.3F};
  for (const std::uint32_t seed : {1U, 2U, 3U}) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    std::mt19937 random{seed};
    Scores scores(expert_count);
    for (int pass = 0; pass < 40; ++pass) {
      policy.world.limits.budget_bytes.assign(pass % 2 == 0 ? 0 : layer_count, random() % 500);
      policy.world.limits.break_even = static_cast<float>(random() % 10) / 10;
      for (int token = 0; token < 3; ++token) {
        for (std::uint16_t layer = 0; layer < layer_count; ++layer) {
          std::ranges::generate(scores, [&] { return odd[random() % std::size(odd)]; });
          policy.predict(layer, scores, random() % 2 == 0 ? draft : target);
          check_queue();
        }
      }
      for (std::uint16_t layer = 0; layer < layer_count; ++layer) {
        policy.access(layer, {static_cast<std::uint16_t>(random() % expert_count)});
        check_queue();
      }
      policy.end_iteration();
      check_queue();
      if (pass % 8 == 0) policy.world.history.begin_request();
    }
  }
}

TEST_P(PrefetchPolicyContract, allocates_nothing_after_construction) {
  const Scores scores{1.5F, 0.4F, 1.2F, 0.7F, 0.0F, 0.9F};
  policy.world.limits.budget_bytes.assign(layer_count, 3 * blob_bytes);
  policy.world.trace.append(1, Experts{2});
  policy.world.trace.append(2, Experts{2});
  const Experts experts{2};
  policy.world.run(1, experts);
  const std::size_t before = allocation_count();
  for (const PredictionSource source : {draft, target}) {
    for (std::uint16_t layer = 0; layer < layer_count; ++layer) {
      policy.world.forecast.predict(layer, scores);
      policy->on_prediction({layer, source, scores}, policy.queue);
    }
    policy->on_access(1, experts, policy.queue);
    policy->on_end_iteration(policy.queue);
  }
  EXPECT_EQ(allocation_count() - before, 0u);
}

TEST_P(PrefetchPolicyContract, predictions_of_nothing_prefetch_nothing) {
  for (const float nothing : {0.0F, -1.0F, std::nanf("")}) {
    for (std::uint16_t layer = 0; layer < layer_count; ++layer) {
      policy.predict(layer, Scores(expert_count, nothing));
      policy.predict(layer, Scores(expert_count, nothing), target);
    }
    EXPECT_EQ(policy.waiting(), Ids{});
  }
}

TEST_P(PrefetchPolicyContract, demands_are_left_alone) {
  policy.queue.push({2, 1}, FillKind::demand);
  policy.predict(2, Scores{0, 1.5F, 0, 0, 0, 0});
  policy.predict(2, Scores{0, 1.5F, 0, 0, 0, 0}, target);
  policy.predict(2, Scores(expert_count, 0.0F));
  policy.access(0, {1});
  policy.end_iteration();
  ASSERT_GT(policy.queue.size(), 0U);
  EXPECT_EQ(policy.queue[0].expert, (ExpertId{2, 1}));
  EXPECT_EQ(policy.queue[0].kind, FillKind::demand);
}

TEST_P(PrefetchPolicyContract, the_same_history_gives_the_same_prefetches) {
  Driven again{GetParam()};
  std::mt19937 random{7};
  for (int step = 0; step < 200; ++step) {
    Scores scores(expert_count);
    std::ranges::generate(scores, [&] { return static_cast<float>(random() % 100) / 50; });
    const auto layer = static_cast<std::uint16_t>(step % layer_count);
    for (Driven* each : {&policy, &again}) {
      each->predict(layer, scores);
      each->access(layer, {layer});
      if (layer + 1 == layer_count) each->end_iteration();
    }
    ASSERT_EQ(policy.waiting(), again.waiting());
  }
}

INSTANTIATE_TEST_SUITE_P(all, PrefetchPolicyContract, ::testing::ValuesIn(prefetch_policy_names()),
                         [](const auto& test) { return test_name(test.param); });

TEST(PrefetchPolicies, an_unknown_name_is_refused_with_those_there_are) {
  EXPECT_EQ(message_of<InvalidArgument>([] { Driven{"psychic"}; }),
            "prefetch policy \"psychic\" asked; use one of on-demand, next-gate, "
            "activation-trace, sp-moe, horizon, oracle");
}

TEST(AppendCritical, takes_the_highest_first_and_the_lowest_index_of_equals) {
  Experts critical{9};
  append_critical(Scores{0.1F, 0.5F, 0.2F, 0.5F, 0.2F}, 3, critical);
  EXPECT_EQ(critical, (Experts{9, 1, 3, 2}));  // what was there stays
}

TEST(AppendCritical, takes_only_finite_scores_above_0) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  Experts critical;
  append_critical(Scores{std::nanf(""), 0.0F, -1.0F, infinity, 0.1F, -infinity}, 4, critical);
  EXPECT_EQ(critical, Experts{4});
  append_critical({}, 4, critical);
  append_critical(Scores{1.0F}, 0, critical);
  EXPECT_EQ(critical, Experts{4});
}

TEST(CountSelected, counts_finite_scores_above_1) {
  EXPECT_EQ(count_selected(Scores{1.0F, 1.1F, 3.0F, std::nanf(""), 0.9F}), 2u);
  EXPECT_EQ(count_selected(Scores{std::numeric_limits<float>::infinity()}), 0u);
}

TEST(PrefetchPolicy, finishes_nothing_that_the_router_did_not_choose_unless_it_says_so) {
  for (const char* name : {"on-demand", "next-gate", "activation-trace", "sp-moe"}) {
    Driven policy{name};
    for (int pass = 0; pass < 20; ++pass) {
      policy.access(1, {0});
      policy.end_iteration();
    }
    policy.predict(1, Scores(expert_count, 1.5F));
    EXPECT_FALSE(policy->keeps({1, 0})) << name;
  }
}

TEST(OnDemand, prefetches_nothing) {
  Driven policy{"on-demand"};
  policy.predict(1, Scores(expert_count, 1.5F));
  policy.access(0, {1});
  policy.end_iteration();
  EXPECT_EQ(policy.waiting(), Ids{});
}

TEST(SpMoe, takes_the_top_k_of_each_drafted_token_in_the_order_of_arrival) {
  Driven policy{"sp-moe"};
  policy.predict(2, Scores{0.1F, 1.4F, 0.0F, 1.5F, 0.2F, 0});
  policy.predict(0, Scores{0, 0, 0, 0, 0.3F, 1.2F});
  policy.predict(2, Scores{1.6F, 1.2F, 0, 0, 0, 0});
  EXPECT_EQ(policy.waiting(), (Ids{{2, 3}, {2, 1}, {0, 5}, {0, 4}, {2, 0}}));
}

TEST(SpMoe, drafts_no_further_than_the_cutoff_layer) {
  Driven policy{"sp-moe"};
  policy.world.limits.cutoff_layer = 2;
  for (std::uint16_t layer = 0; layer < layer_count; ++layer) {
    policy.predict(layer, Scores{0, 1.5F, 0, 0, 0, 0});
  }
  EXPECT_EQ(policy.waiting(), (Ids{{0, 1}, {1, 1}}));
}

TEST(SpMoe, ignores_the_predictions_of_the_target) {
  Driven policy{"sp-moe"};
  policy.predict(1, Scores{1.5F, 0, 0, 0, 0, 0}, target);
  EXPECT_EQ(policy.waiting(), Ids{});
}

TEST(NextGate, takes_all_that_the_rows_of_the_target_select) {
  Driven policy{"next-gate"};
  policy.predict(1, Scores{1.2F, 0.9F, 2.5F, 1.3F, 0, 0}, target);
  EXPECT_EQ(policy.waiting(), (Ids{{1, 2}, {1, 3}, {1, 0}}));
}

TEST(NextGate, takes_top_k_of_probabilities_and_ignores_drafts) {
  Driven policy{"next-gate"};
  policy.predict(1, Scores{0.1F, 0.5F, 0.2F, 0, 0, 0}, draft);
  EXPECT_EQ(policy.waiting(), Ids{});
  policy.predict(1, Scores{0.1F, 0.5F, 0.2F, 0, 0, 0}, target);
  EXPECT_EQ(policy.waiting(), (Ids{{1, 1}, {1, 2}}));
}

TEST(Horizon, orders_by_deadline_then_by_probability) {
  Driven policy{"horizon"};
  policy.predict(2, Scores{1.5F, 0, 0, 0, 0, 0});
  policy.predict(1, Scores{0.6F, 0, 1.5F, 0, 0, 0.8F});
  policy.predict(3, Scores{0, 1.5F, 0, 0, 0, 0}, target);  // from whatever source
  EXPECT_EQ(policy.waiting(), (Ids{{1, 2}, {1, 5}, {1, 0}, {2, 0}, {3, 1}}));
}

TEST(Horizon, leaves_out_what_is_less_likely_than_the_break_even) {
  Driven policy{"horizon"};
  policy.world.limits.break_even = 0.75F;
  policy.predict(1, Scores{0.6F, 0, 1.5F, 0, 0, 0});
  EXPECT_EQ(policy.waiting(), (Ids{{1, 2}}));
  policy.world.limits.break_even = 0.3F;
  policy.predict(1, Scores(expert_count, 0.0F));
  EXPECT_EQ(policy.waiting(), (Ids{{1, 2}, {1, 0}}));
}

TEST(Horizon, joins_the_drafted_tokens) {
  Driven policy{"horizon"};
  policy.world.limits.break_even = 0.75F;
  const Scores doubtful{0, 0.5F, 0, 0, 0, 0};
  policy.predict(1, doubtful);
  EXPECT_EQ(policy.waiting(), Ids{});
  policy.predict(1, doubtful);
  EXPECT_EQ(policy.waiting(), (Ids{{1, 1}}));
}

TEST(Horizon, the_least_likely_stands_back_when_a_deadline_cannot_be_met) {
  Driven policy{"horizon"};
  policy.world.limits.budget_bytes = {blob_bytes, blob_bytes, 2 * blob_bytes, 3 * blob_bytes - 1};
  for (const float doubtful : {0.8F, 0.0F}) {
    policy.predict(0, Scores{0.75F * doubtful, 0, 0, 0, 0, 0});
    policy.predict(1, Scores{1.5F, 0, 0, 0, 0, 0});
    policy.predict(2, Scores{0, 1.5F, 0, 0, 0, 0});
    policy.predict(3, Scores{0, 0, doubtful, 0, 0, 0});
    // Two fit by layer 3; the others are begun once those are done.
    const Ids waiting = policy.waiting();
    ASSERT_EQ(waiting.size(), 4u);
    EXPECT_EQ((Ids{waiting.begin(), waiting.begin() + 2}), (Ids{{1, 0}, {2, 1}}));
  }
}

TEST(Horizon, what_was_moved_since_leaves_less_of_the_budget) {
  Driven policy{"horizon"};
  policy.world.limits.budget_bytes.assign(layer_count, 2 * blob_bytes);
  policy.world.limits.moved_bytes = blob_bytes + 1;
  policy.predict(0, Scores{0.6F, 0, 0, 0, 0, 0});
  for (std::uint16_t layer = 1; layer < layer_count; ++layer) {
    policy.predict(layer, layer == 2 ? Scores{0, 1.5F, 0, 0, 0, 0} : Scores(expert_count, 0.0F));
  }
  // Nothing whole fits any more, so that both stand back, in the order of layers.
  EXPECT_EQ(policy.waiting(), (Ids{{0, 0}, {2, 1}}));
  EXPECT_GE(policy.queue[0].order, layer_count);
  policy.world.limits.moved_bytes = blob_bytes;
  policy.predict(0, Scores{0.0F, 0, 0, 0, 0, 0});
  EXPECT_EQ(policy.waiting(), (Ids{{2, 1}, {0, 0}}));
}

TEST(Horizon, a_budget_of_nothing_still_begins_what_is_likely) {
  Driven policy{"horizon"};
  policy.world.limits.budget_bytes.assign(layer_count, 0);
  policy.predict(0, Scores{0, 1.5F, 0, 0, 0, 0});
  EXPECT_EQ(policy.waiting(), (Ids{{0, 1}}));
}

TEST(Horizon, plans_no_copy_of_what_is_resident) {
  Driven policy{"horizon"};
  policy.world.limits.budget_bytes.assign(layer_count, blob_bytes);
  policy.world.make_resident({1, 0});
  policy.predict(1, Scores{1.5F, 1.5F, 0, 0, 0, 0});
  EXPECT_EQ(policy.waiting(), (Ids{{1, 1}}));  // which has the budget to itself
  EXPECT_LT(policy.queue[0].order, layer_count);
}

TEST(Horizon, asks_to_keep_what_is_resident_if_it_is_likelier_used_than_not) {
  Driven policy{"horizon"};
  policy.world.limits.break_even = 0.1F;
  policy.world.make_resident({1, 0});
  policy.world.make_resident({1, 1});
  policy.predict(1, Scores{1.5F, 0.3F, 0.3F, 0, 0, 0});
  EXPECT_EQ(policy.waiting(), (Ids{{1, 0}, {1, 2}}));
}

TEST(Horizon, admits_only_swaps_that_are_worthwhile) {
  Driven policy{"horizon"};
  policy.world.limits.break_even = 0.85F;
  policy.predict(1, Scores{1.5F, 1.5F, 0.0F, 0.8F, 0, 0});
  const auto admits = [&](ExpertId incoming, ExpertId victim) {
    return policy->admits({incoming, victim});
  };
  EXPECT_TRUE(admits({1, 0}, {1, 2}));
  EXPECT_FALSE(admits({1, 0}, {1, 1}));  // as good
  EXPECT_FALSE(admits({1, 2}, {1, 0}));
  EXPECT_FALSE(admits({1, 3}, {1, 2}));  // under the break-even
  policy.world.limits.break_even = 0.1F;
  EXPECT_TRUE(admits({1, 3}, {1, 2}));
  policy.world.limits.break_even = 0;
  EXPECT_FALSE(admits({1, 4}, {1, 2}));  // gains nothing
}

TEST(Horizon, finishes_what_it_would_admit_into_an_empty_slot) {
  Driven policy{"horizon"};
  for (int pass = 0; pass < 40; ++pass) {
    policy.access(1, {0});
    policy.end_iteration();
  }
  policy.predict(1, Scores{0, 1.5F, 0, 0, 0, 0});
  policy.access(1, {2});
  EXPECT_TRUE(policy->keeps({1, 0}));   // seldom left out
  EXPECT_FALSE(policy->keeps({1, 1}));  // predicted, and wrong
  policy.world.limits.break_even = 0.99F;
  EXPECT_FALSE(policy->keeps({1, 0}));
  policy.world.limits.break_even = 0;
  EXPECT_FALSE(policy->keeps({1, 5}));  // gains nothing
}

TEST(Horizon, the_end_of_the_iteration_cancels_its_prefetches) {
  Driven policy{"horizon"};
  policy.predict(1, Scores(expert_count, 1.5F));
  EXPECT_GT(policy.queue.size(), 0U);
  policy.end_iteration();
  EXPECT_EQ(policy.waiting(), Ids{});
}

TEST(ActivationTrace, follows_the_nearest_past_request_nearer_layers_first) {
  Driven policy{"activation-trace"};
  policy.access(0, {0, 1});
  policy.access(1, {4});
  policy.access(2, {3});
  policy.access(3, {2});
  EXPECT_EQ(policy.waiting(), Ids{});  // there was no past yet
  policy.world.history.begin_request();
  policy.access(0, {5});
  policy.world.history.begin_request();
  policy.access(0, {1});
  EXPECT_EQ(policy.waiting(), (Ids{{1, 4}, {2, 3}, {3, 2}}));
  policy.access(2, {3});
  EXPECT_EQ(policy.waiting(), (Ids{{3, 2}}));
  policy.end_iteration();
  EXPECT_EQ(policy.waiting(), (Ids{{0, 0}, {0, 1}}));  // for the next pass
}

TEST(ActivationTrace, prefers_large_shares_and_leaves_out_the_smallest) {
  Driven policy{"activation-trace"};
  auto& history = policy.world.history;
  history.observe(1, Experts{0, 1, 2}, std::vector<std::uint32_t>{30, 69, 1});
  history.begin_request();
  policy.access(0, {3});
  EXPECT_EQ(policy.waiting(), (Ids{{1, 1}, {1, 0}}));
}

/// Three passes over two layers.
void append_needs(RoutingTrace& trace) {
  for (const auto& [layer, experts] : std::vector<std::pair<std::uint16_t, Experts>>{
           {0, {1}}, {1, {2, 0}}, {0, {3}}, {1, {2}}, {0, {5}}, {1, {5}}}) {
    trace.append(layer, experts);
  }
}

TEST(Oracle, prefetches_the_next_needs_of_one_pass_in_order) {
  Driven policy{"oracle"};
  append_needs(policy.world.trace);
  policy.access(0, {1});
  EXPECT_EQ(policy.waiting(), (Ids{{1, 2}, {1, 0}, {0, 3}, {0, 5}}));
}

TEST(Oracle, goes_on_between_two_iterations) {
  Driven policy{"oracle"};
  append_needs(policy.world.trace);
  policy.access(0, {1});
  policy.access(1, {2, 0});
  policy.queue.cancel_all(FillKind::prefetch);  // as the scheduler does
  policy.end_iteration();
  EXPECT_EQ(policy.waiting(), (Ids{{0, 3}, {1, 2}, {0, 5}, {1, 5}}));
}

TEST(Oracle, fills_only_what_is_used_before_its_victim) {
  Driven policy{"oracle"};
  append_needs(policy.world.trace);
  policy.access(0, {1});
  EXPECT_TRUE(policy->admits({{1, 0}, {0, 3}}));
  EXPECT_FALSE(policy->admits({{0, 3}, {1, 0}}));
  EXPECT_FALSE(policy->admits({{1, 0}, {1, 2}}));  // used at the same time
  EXPECT_TRUE(policy->admits({{1, 5}, {0, 1}}));   // never used again
}

TEST(Oracle, finishes_what_is_used_within_a_pass_over_the_layers) {
  Driven policy{"oracle"};
  append_needs(policy.world.trace);
  EXPECT_TRUE(policy->keeps({0, 3}));   // in the third need
  EXPECT_FALSE(policy->keeps({0, 5}));  // in the fifth
  EXPECT_FALSE(policy->keeps({2, 0}));  // never
  policy.access(0, {1});
  EXPECT_TRUE(policy->keeps({0, 5}));
}

TEST(Oracle, knows_nothing_once_the_run_has_left_the_trace) {
  Driven policy{"oracle"};
  append_needs(policy.world.trace);
  policy.access(0, {1});
  policy.access(1, {3});
  EXPECT_EQ(policy.waiting(), Ids{});
  EXPECT_FALSE(policy->admits({{0, 3}, {0, 1}}));
}

}  // namespace
}  // namespace spmoe
