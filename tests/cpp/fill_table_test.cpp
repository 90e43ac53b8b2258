#include "schedule/fill_table.hpp"

#include <gtest/gtest.h>

#include <stdexcept>

namespace spmoe {
namespace {

constexpr SchedulerShape shape{/*layer_count=*/2, /*expert_count=*/4, /*slot_count=*/3,
                               /*blob_bytes=*/100};

TEST(FillTable, a_fill_that_arrives_makes_its_expert_resident_and_counts_its_bytes) {
  FillTable fills{shape};
  const SlotIndex slot = fills.begin({1, 2}, FillKind::prefetch);
  EXPECT_EQ(fills[slot].state, FillState::filling);
  EXPECT_FALSE(fills[slot].used);
  EXPECT_TRUE(fills[slot].kept_for_pass);
  EXPECT_EQ(fills.find({1, 2}), slot);
  EXPECT_EQ(fills.resident_count(), 0u);
  fills.finish(slot);
  EXPECT_EQ(fills[slot].state, FillState::none);
  EXPECT_EQ(fills.resident_count(), 1u);
  fills.lease(slot);
  EXPECT_TRUE(fills[slot].used);
  EXPECT_FALSE(fills[slot].kept_for_pass);
  EXPECT_EQ(fills.stats()[1].prefetch_bytes, 100u);
  EXPECT_EQ(fills.stats()[1].prefetch_used_bytes, 100u);
  fills.release(slot);
  fills.lease(slot);
  EXPECT_EQ(fills.stats()[1].prefetch_used_bytes, 100u) << "counted once";
}

TEST(FillTable, what_is_computed_behind_a_fill_is_known_until_the_fill_ends) {
  FillTable fills{shape};
  const SlotIndex slot = fills.begin({0, 0}, FillKind::demand);
  EXPECT_THROW(fills.read(slot), std::logic_error);
  EXPECT_TRUE(fills.issue(slot));
  EXPECT_FALSE(fills.read_before_arrival());
  fills.read(slot);
  EXPECT_TRUE(fills.read_before_arrival());
  EXPECT_THROW(fills.cancel(slot), std::logic_error);
  fills.finish(slot);
  EXPECT_FALSE(fills.read_before_arrival());
}

TEST(FillTable, a_cancelled_fill_has_its_slot_until_it_ends_but_not_its_expert) {
  FillTable fills{shape};
  const SlotIndex slot = fills.begin({0, 3}, FillKind::prefetch);
  fills.promote(slot);
  fills.cancel(slot);
  EXPECT_FALSE(fills.find({0, 3}));
  EXPECT_TRUE(fills.ending({0, 3}));
  EXPECT_FALSE(fills.issue(slot)) << "too late";
  const auto change = fills.next_change();
  ASSERT_TRUE(change);
  EXPECT_EQ(change->slot, slot);
  EXPECT_EQ(change->to, FillChange::To::cancelled) << "in place of the promotion";
  EXPECT_FALSE(fills.next_change());
  fills.abort(slot, 40);
  EXPECT_FALSE(fills.ending({0, 3}));
  EXPECT_EQ(fills.slots()[slot].state, SlotState::empty);
  EXPECT_EQ(fills.stats()[0].prefetch_bytes, 40u);
}

TEST(FillTable, a_slot_whose_fill_failed_is_empty_once_it_is_not_leased) {
  FillTable fills{shape};
  const SlotIndex slot = fills.begin({0, 1}, FillKind::demand);
  fills.issue(slot);
  fills.lease(slot);
  fills.read(slot);
  fills.abort(slot, 7);
  EXPECT_EQ(fills[slot].state, FillState::failed);
  EXPECT_FALSE(fills.read_before_arrival());
  EXPECT_EQ(fills.slots()[slot].state, SlotState::filling);
  fills.release(slot);
  EXPECT_EQ(fills[slot].state, FillState::none);
  EXPECT_EQ(fills.slots()[slot].state, SlotState::empty);
}

TEST(FillTable, changes_are_taken_in_the_order_in_which_they_were_made) {
  FillTable fills{shape};
  const SlotIndex low = fills.begin({0, 0}, FillKind::prefetch);
  const SlotIndex middle = fills.begin({0, 1}, FillKind::prefetch);
  const SlotIndex high = fills.begin({0, 2}, FillKind::prefetch);
  fills.promote(low);
  fills.promote(high);
  fills.cancel(middle);
  fills.cancel(low);  // in place of its promotion
  for (const SlotIndex slot : {high, middle, low}) {
    const auto change = fills.next_change();
    ASSERT_TRUE(change);
    EXPECT_EQ(change->slot, slot);
    EXPECT_EQ(change->to, slot == high ? FillChange::To::promoted : FillChange::To::cancelled);
  }
  EXPECT_FALSE(fills.next_change());
}

TEST(FillTable, fills_in_flight_are_counted_by_kind_until_they_end) {
  FillTable fills{shape};
  const SlotIndex demand = fills.begin({0, 0}, FillKind::demand);
  const SlotIndex prefetch = fills.begin({0, 1}, FillKind::prefetch);
  EXPECT_EQ(fills.in_flight(FillKind::demand), 1u);
  EXPECT_EQ(fills.in_flight(FillKind::prefetch), 1u);
  fills.promote(prefetch);
  EXPECT_EQ(fills.in_flight(FillKind::prefetch), 1u) << "its kind stays";
  fills.demote(demand);
  EXPECT_EQ(fills.in_flight(FillKind::demand), 0u);
  EXPECT_EQ(fills.in_flight(FillKind::prefetch), 2u);
  fills.finish(demand);
  fills.abort(prefetch, 3);
  EXPECT_EQ(fills.in_flight(), 0u);
  EXPECT_THROW(fills.finish(demand), std::logic_error) << "ended twice";
  EXPECT_THROW(fills.abort(prefetch, 3), std::logic_error) << "ended twice";
  EXPECT_EQ(fills.in_flight(), 0u);
}

TEST(FillTable, a_change_is_forgotten_when_its_fill_ends) {
  FillTable fills{shape};
  const SlotIndex slot = fills.begin({0, 1}, FillKind::prefetch);
  fills.promote(slot);
  fills.finish(slot);
  EXPECT_FALSE(fills.next_change());
}

}  // namespace
}  // namespace spmoe
