#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "allocation_counter.hpp"
#include "policy_names.hpp"
#include "scheduler_driver.hpp"

namespace spmoe {
namespace {

/// Drives a Scheduler under any policies with random predictions, and holds what it does against
/// what no policy may break. A simpler model than Walk's, which knows the one right answer.
class PolicyWalk {
 public:
  PolicyWalk(const SchedulerShape& shape, const PolicyNames& names, std::uint32_t seed)
      : shape_{shape}, random_{seed}, scheduler_{shape, names}, slots_(shape.slot_count) {
    scheduler_.foresight().limits.break_even = 0.3F;
    if (seed % 2 == 0) {
      scheduler_.foresight().limits.budget_bytes.assign(shape.layer_count, 3 * blob_bytes);
      scheduler_.foresight().limits.cutoff_layer = 2;
    }
    routing_ = random_routing();
    // Half the walks follow the trace, the others leave it.
    RoutingTrace trace{shape.layer_count, shape.expert_count};
    for (std::size_t need = 0; need < routing_.size(); ++need) {
      trace.append(layer_of(need), routing_[need]);
    }
    scheduler_.foresight().replay(std::move(trace));
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
        if (random_() % 2 == 0) finish_fill();
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

  /// Ends every fill in flight, so that the counters can be closed.
  void finish() {
    while (!in_flight_.empty()) finish_fill();
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
    scheduler_.access(layer, experts);
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
      if (random_() % 2 == 0) finish_fill();
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

  void finish_fill() {
    if (in_flight_.empty()) return;
    const auto place =
        in_flight_.begin() + static_cast<std::ptrdiff_t>(random_() % in_flight_.size());
    const SlotIndex ended = *place;
    in_flight_.erase(place);
    report_changes();
    const bool cancelled = slots_[ended].cancelled;
    const std::uint64_t part = random_() % blob_bytes;
    if ((!running_ || cancelled) && random_() % 16 == 0) {
      slots_[ended] = {};
      moved_bytes_ += part;
      ASSERT_EQ(scheduler_.progress(ended, FillOutcome::failed, part), FailureScope::nothing);
      return;
    }
    if (cancelled && random_() % 4 != 0) {
      slots_[ended] = {};
      moved_bytes_ += part;
      cancelled_bytes_ += blob_bytes - part;
      scheduler_.progress(ended, FillOutcome::cancelled, part);
      return;
    }
    slots_[ended].filling = slots_[ended].cancelled = false;
    moved_bytes_ += blob_bytes;
    scheduler_.progress(ended, FillOutcome::arrived);
  }

  void report_changes() {
    while (const auto change = scheduler_.fills().next_change()) {
      ModelSlot& slot = slots_.at(change->slot);
      ASSERT_TRUE(slot.filling) << "nothing is in flight";
      if (change->to == FillChange::To::cancelled) {
        ASSERT_FALSE(std::exchange(slot.cancelled, true)) << "cancelled twice";
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
    ASSERT_EQ(scheduler_.fills().resident_count(),
              std::ranges::count_if(
                  slots_, [](const ModelSlot& slot) { return slot.expert && !slot.filling; }));
    for (const LayerStats& layer : scheduler_.fills().stats()) {
      ASSERT_LE(layer.predicted_accesses, layer.hits + layer.late + layer.misses);
      ASSERT_LE(layer.recalled, layer.recalled_2k);
      ASSERT_LE(layer.recalled_2k, layer.predicted_accesses);
      ASSERT_LE(layer.recalled, layer.critical);
    }
  }

  struct ModelSlot {
    std::optional<ExpertId> expert;
    bool filling = false;
    bool leased = false;
    bool unused = false;  // prefetched, and not used since
    bool cancelled = false;
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
    finish_prefetches(scheduler);
    scheduler.end_iteration();
    EXPECT_FALSE(scheduler.next_fill()) << "a prefetch outlived its iteration";
  }
  const LayerStats drafted = total(scheduler);
  EXPECT_EQ(drafted.prefetch_used_bytes, 0u);
  EXPECT_EQ(drafted.predicted_accesses, 0u);
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
  scheduler.foresight().replay(std::move(trace));
  scheduler.foresight().limits.budget_bytes.assign(3, 2 * blob_bytes);
  const std::vector<float> scores{1.5F, 0.1F, 1.2F, 0.3F, 0.0F, 0.8F};
  std::vector<ReadyExpert> ready;
  ready.reserve(6);
  const std::size_t before = allocation_count();
  for (int pass = 0; pass < 4; ++pass) {
    scheduler.begin_request();
    for (std::uint16_t layer = 0; layer < 3; ++layer) scheduler.predict(layer, scores);
    for (std::uint16_t layer = 0; layer < 3; ++layer) {
      scheduler.access(layer, experts);
      for (std::size_t computed = 0; computed < experts.size();) {
        if (const auto fill = scheduler.next_fill())
          scheduler.progress(fill->slot, FillOutcome::arrived);
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

TEST(SchedulerPolicy, a_prefetch_that_is_not_worth_its_victim_holds_up_none_behind_it) {
  constexpr std::uint16_t experts = 60;
  Scheduler scheduler{{2, experts, 8, blob_bytes, 2}, {"horizon", "auto"}};
  scheduler.foresight().limits.break_even = 0;
  run(scheduler, 1, all_of(8));
  scheduler.end_iteration();
  scheduler.predict(0, std::vector<float>(experts, 0.02F));  // all of them wait, for an empty slot
  EXPECT_FALSE(scheduler.next_fill());
  std::vector<float> likely(experts, 0.0F);
  likely.back() = 1.9F;
  scheduler.predict(1, likely);
  const auto fill = scheduler.next_fill();
  ASSERT_TRUE(fill);
  EXPECT_EQ(fill->expert, (ExpertId{1, experts - 1}));
}

INSTANTIATE_TEST_SUITE_P(all, SchedulerPolicies,
                         ::testing::Combine(::testing::ValuesIn(prefetch_policy_names()),
                                            ::testing::ValuesIn(eviction_policy_names())),
                         [](const auto& test) {
                           return test_name(std::get<0>(test.param) + "_with_" +
                                            std::get<1>(test.param));
                         });

}  // namespace
}  // namespace spmoe
