#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "scheduler_driver.hpp"

namespace spmoe {
namespace {

/// Drives a Scheduler at random, the way the runtime does, and holds every answer against a plain
/// model of what the slots and the running need must look like.
class Walk {
 public:
  Walk(const SchedulerShape& shape, std::uint32_t seed)
      : shape_{shape}, random_{seed}, scheduler_{shape}, slots_(shape.slot_count) {}

  /// One random action. Fails the running test if an invariant is broken.
  void step() {
    if (!running_) {
      switch (pick(13)) {
        case 12: return issue();
        case 0: return end_iteration();
        case 1: return finish_fill();
        case 2: return report_changes();
        case 3: return predict();
        case 4:
        case 5:
        case 6:
        case 7: return start(FillKind::prefetch);
        default: return access();
      }
    }
    const auto chance = pick(100);
    if (chance < 30) return start(pick(3) == 0 ? FillKind::demand : FillKind::prefetch);
    if (chance < 45) return issue();
    if (chance < 60) return finish_fill();
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
      finish_fill();
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
    ASSERT_EQ(scheduler_.fills().resident_count(),
              std::ranges::count_if(
                  slots_, [](const ModelSlot& slot) { return slot.expert && !slot.filling; }));
    for (const FillKind kind : {FillKind::prefetch, FillKind::demand}) {
      ASSERT_EQ(scheduler_.fills().in_flight(kind),
                std::ranges::count(in_flight_, kind,
                                   [this](SlotIndex slot) { return slots_[slot].kind; }));
    }
  }

  [[nodiscard]] std::uint64_t needs_ended() const { return needs_ended_; }
  /// Experts that were computed behind a fill in flight, and how many of those failed.
  [[nodiscard]] std::uint64_t computed_behind() const { return computed_behind_; }
  [[nodiscard]] std::uint64_t spoiled() const { return spoiled_; }
  /// Experts that were needed while a cancelled fill of theirs was in flight.
  [[nodiscard]] std::uint64_t needed_again() const { return needed_again_; }

 private:
  struct ModelSlot {
    std::optional<ExpertId> expert;
    bool filling = false;
    FillKind kind = FillKind::demand;
    bool leased = false;
    bool unused = false;   // prefetched, and not used since
    bool protect = false;  // from prefetches
    bool cancelled = false;
    bool issued = false;
    bool computed_behind = false;
    bool failed = false;  // and leased
  };
  enum class Want : std::uint8_t { waiting, ready, taken };

  std::size_t pick(std::size_t count) { return random_() % count; }

  std::optional<SlotIndex> find(ExpertId expert) const {
    for (SlotIndex slot = 0; slot < shape_.slot_count; ++slot) {
      if (slots_[slot].expert == expert) return slot;
    }
    return std::nullopt;
  }

  void access() {
    // Mostly one layer after the other, as a forward pass goes.
    layer_ = static_cast<std::uint16_t>(pick(10) == 0 ? pick(shape_.layer_count)
                                                      : (layer_ + 1U) % shape_.layer_count);
    const auto cancelled = std::ranges::find(slots_, true, &ModelSlot::cancelled);
    if (cancelled != slots_.end() && pick(2) == 0) layer_ = cancelled->expert->layer;
    Experts experts = all_of(shape_.expert_count);
    if (pick(3) != 0) {
      std::ranges::shuffle(experts, random_);
      experts.resize(pick(experts.size()));
    }
    running_ = true;
    broken_ = false;
    predicted_.erase(layer_);
    ran_.insert(layer_);
    wants_.clear();
    fills_in_need_.clear();
    std::erase_if(ahead_, [this](ExpertId id) { return id.layer == layer_; });
    for (const std::uint16_t expert : experts) {
      const auto slot = find({layer_, expert});
      wants_[expert] = Want::waiting;
      if (!slot || slots_[*slot].cancelled) {
        ++misses_;
        needed_again_ += slot ? 1 : 0;
        demands_.insert({layer_, expert});
      } else if (slots_[*slot].filling) {
        ++late_;
        if (slots_[*slot].issued) {
          become_ready(*slot);
        } else if (slots_[*slot].kind == FillKind::prefetch) {
          changes_[*slot] = FillChange::To::promoted;
        }
      } else {
        ++hits_;
        become_ready(*slot);
      }
    }
    for (SlotIndex i = 0; i < shape_.slot_count; ++i) {
      ModelSlot& slot = slots_[i];
      if (!slot.expert || slot.expert->layer != layer_) continue;
      slot.protect = false;
      const bool prefetching = slot.filling && slot.kind == FillKind::prefetch && !slot.issued;
      if (!prefetching || slot.cancelled || wants_.contains(slot.expert->expert)) continue;
      slot.cancelled = true;
      changes_[i] = FillChange::To::cancelled;
    }
    const auto next = static_cast<std::uint16_t>(layer_ + 1);
    if (experts.size() == shape_.expert_count && next < shape_.layer_count) {
      for (const std::uint16_t expert : all_of(shape_.expert_count)) {
        const auto slot = find({next, expert});
        if (slot && !slots_[*slot].cancelled) {
          slots_[*slot].protect = true;
        } else {
          ahead_.insert({next, expert});
        }
      }
    }
    scheduler_.access(layer_, experts);
    if (pick(4) != 0) report_changes();
    end_if_done();
  }

  void report_changes() {
    while (const auto change = scheduler_.fills().next_change()) {
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
    wants_[it.expert->expert] = Want::ready;
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

  void issue() {
    if (in_flight_.empty()) return;
    const SlotIndex moving = in_flight_[pick(in_flight_.size())];
    ModelSlot& slot = slots_[moving];
    if (std::exchange(slot.issued, true)) return;
    if (!slot.cancelled && waited_for(*slot.expert)) become_ready(moving);
    scheduler_.progress(moving, FillOutcome::issued);
  }

  void finish_fill() {
    if (in_flight_.empty()) return;
    const auto place = in_flight_.begin() + static_cast<std::ptrdiff_t>(pick(in_flight_.size()));
    const SlotIndex ended = *place;
    in_flight_.erase(place);
    ModelSlot& slot = slots_[ended];
    const ExpertId expert = slot.expert.value();
    const auto want = wants_.find(expert.expert);
    const bool waited = waited_for(expert);
    std::uint64_t& moved = slot.kind == FillKind::demand ? moved_demand_ : moved_prefetch_;
    const std::uint64_t part = pick(blob_bytes);
    changes_.erase(ended);
    if (may_fail_ && pick(20) == 0) {
      const bool demanded = waited && slot.kind == FillKind::demand;
      const FailureScope spoiled = slot.leased || demanded ? FailureScope::access
                                   : slot.computed_behind  ? FailureScope::results
                                                           : FailureScope::nothing;
      spoiled_ += slot.leased || slot.computed_behind ? 1 : 0;
      if (slot.leased) {
        slot.failed = true;
        slot.issued = slot.computed_behind = false;
      } else {
        slot = {};
      }
      moved += part;
      if (demanded) wants_.erase(want);
      if (waited && !demanded) demands_.insert(expert);
      broken_ |= demanded;
      ASSERT_EQ(scheduler_.progress(ended, FillOutcome::failed, part), spoiled);
      return;
    }
    if (slot.cancelled && !slot.issued && pick(4) != 0) {
      slot = {};
      moved += part;
      cancelled_bytes_ += blob_bytes - part;
      scheduler_.progress(ended, FillOutcome::cancelled, part);
      return;
    }
    if (slot.cancelled) demands_.erase(expert);
    slot.filling = slot.cancelled = slot.issued = slot.computed_behind = false;
    moved += blob_bytes;
    if (waited) become_ready(ended);
    scheduler_.progress(ended, FillOutcome::arrived);
  }

  void take() {
    std::vector<ReadyExpert> ready;
    scheduler_.take_ready(ready);
    ASSERT_EQ(ready.size(), expected_.size());
    for (std::size_t i = 0; i < ready.size(); ++i) {
      ASSERT_EQ(ready[i].expert, expected_[i].expert);
      ASSERT_EQ(ready[i].slot, expected_[i].slot);
      ModelSlot& slot = slots_[ready[i].slot];
      ASSERT_EQ(ready[i].in_flight, slot.issued);
      slot.computed_behind |= slot.issued;
      computed_behind_ += slot.issued ? 1 : 0;
      wants_.at(ready[i].expert) = Want::taken;
    }
    expected_.clear();
    ASSERT_EQ(scheduler_.fills().read_before_arrival(),
              std::ranges::any_of(slots_, &ModelSlot::computed_behind));
  }

  void release(ModelSlot& slot) {
    slot.leased = false;
    if (slot.failed) slot = {};
  }

  void compute() {
    const auto taken =
        std::ranges::find_if(wants_, [](const auto& want) { return want.second == Want::taken; });
    if (taken != wants_.end()) {
      release(slots_[find({layer_, taken->first}).value()]);
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
    scheduler_.abandon_access();
    for (const auto& [expert, want] : wants_) {
      const auto slot = find({layer_, expert});
      if (want != Want::waiting || !slot || slots_[*slot].cancelled) continue;
      slots_[*slot].kind = FillKind::prefetch;
      slots_[*slot].unused = true;
    }
    wants_.clear();
    expected_.clear();
    demands_.clear();
    for (ModelSlot& slot : slots_) release(slot);
    running_ = broken_ = false;
  }

  void predict() {
    const auto layer = static_cast<std::uint16_t>(pick(shape_.layer_count));
    if (!ran_.contains(layer)) predicted_.insert(layer);
    scheduler_.predict(layer, {});
  }

  bool waited_for(ExpertId expert) const {
    const auto want = wants_.find(expert.expert);
    return running_ && expert.layer == layer_ && want != wants_.end() &&
           want->second == Want::waiting;
  }

  void end_iteration() {
    scheduler_.end_iteration();
    ahead_.clear();
    for (SlotIndex i = 0; i < shape_.slot_count; ++i) {
      ModelSlot& slot = slots_[i];
      if (!std::exchange(slot.protect, false)) continue;
      if (!slot.filling || slot.kind != FillKind::prefetch || slot.cancelled || slot.issued) {
        continue;
      }
      if (!predicted_.contains(slot.expert->layer) || waited_for(*slot.expert)) continue;
      slot.cancelled = true;
      changes_[i] = FillChange::To::cancelled;
    }
    predicted_.clear();
    ran_.clear();
  }

  SchedulerShape shape_;
  std::mt19937 random_;
  Scheduler scheduler_;
  std::vector<ModelSlot> slots_;
  std::vector<SlotIndex> in_flight_;
  std::set<ExpertId> demands_;                   // not started
  std::set<ExpertId> ahead_;                     // to be read ahead, not started
  std::set<std::uint16_t> predicted_, ran_;      // layers, in this iteration
  std::map<SlotIndex, FillChange::To> changes_;  // not reported
  std::uint16_t layer_ = 0;
  bool running_ = false;
  bool broken_ = false;  // a fill that the need waited for has failed
  bool may_fail_ = true;
  std::map<std::uint16_t, Want> wants_;
  std::map<ExpertId, int> fills_in_need_;
  std::vector<ReadyExpert> expected_;
  std::uint64_t hits_ = 0, late_ = 0, misses_ = 0, needs_ended_ = 0, needed_again_ = 0;
  std::uint64_t computed_behind_ = 0, spoiled_ = 0;
  std::uint64_t cancelled_bytes_ = 0;
  std::uint64_t moved_demand_ = 0, moved_prefetch_ = 0, used_prefetch_ = 0;
};

TEST(Scheduler, keeps_its_invariants_on_random_walks) {
  constexpr SchedulerShape shapes[] = {{3, 6, 1, blob_bytes},
                                       {3, 6, 2, blob_bytes},
                                       {4, 5, 7, blob_bytes},
                                       {2, 8, 13, blob_bytes},
                                       {3, 4, 12, blob_bytes}};
  std::uint64_t needed_again = 0;
  std::uint64_t computed_behind = 0;
  std::uint64_t spoiled = 0;
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
    needed_again += walk.needed_again();
    computed_behind += walk.computed_behind();
    spoiled += walk.spoiled();
  }
  EXPECT_GT(computed_behind, 1000u);
  EXPECT_GT(spoiled, 100u);
  EXPECT_GT(needed_again, 20u);
}

}  // namespace
}  // namespace spmoe
