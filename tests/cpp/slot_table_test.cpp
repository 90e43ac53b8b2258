#include "schedule/slot_table.hpp"

#include <gtest/gtest.h>

#include <optional>
#include <stdexcept>

namespace spmoe {
namespace {

constexpr ExpertId some{.layer = 1, .expert = 2};
constexpr ExpertId other{.layer = 2, .expert = 1};

TEST(SlotTable, starts_empty) {
  const SlotTable table{3, 2, 4};
  ASSERT_EQ(table.slots().size(), 3u);
  for (const Slot& slot : table.slots()) {
    EXPECT_EQ(slot.state, SlotState::empty);
    EXPECT_EQ(slot.leases, 0u);
  }
  EXPECT_EQ(table.find(some), std::nullopt);
  EXPECT_EQ(table.find_empty(), 0u);
}

TEST(SlotTable, an_expert_lives_from_fill_to_eviction) {
  SlotTable table{2, 3, 4};
  table.begin_fill(0, some);
  EXPECT_EQ(table[0].state, SlotState::filling);
  EXPECT_EQ(table[0].expert, some);
  EXPECT_EQ(table.find(some), 0u);
  table.finish_fill(0);
  EXPECT_EQ(table[0].state, SlotState::resident);
  EXPECT_EQ(table.find(some), 0u);
  table.evict(0);
  EXPECT_EQ(table[0].state, SlotState::empty);
  EXPECT_EQ(table.find(some), std::nullopt);
  table.begin_fill(0, other);
  EXPECT_EQ(table[0].expert, other);
}

TEST(SlotTable, a_failed_fill_leaves_the_slot_empty_and_the_expert_nowhere) {
  SlotTable table{1, 3, 4};
  table.begin_fill(0, some);
  table.abort_fill(0);
  EXPECT_EQ(table[0].state, SlotState::empty);
  EXPECT_EQ(table.find(some), std::nullopt);
  EXPECT_EQ(table.find_empty(), 0u);
  table.begin_fill(0, some);
  EXPECT_EQ(table.find(some), 0u);
}

TEST(SlotTable, the_lowest_empty_slot_is_filled_next) {
  SlotTable table{4, 1, 8};
  for (std::uint16_t i = 0; i < 4; ++i) {
    EXPECT_EQ(table.find_empty(), i);
    table.begin_fill(i, {0, i});
    table.finish_fill(i);
  }
  EXPECT_EQ(table.find_empty(), std::nullopt);
  for (const SlotIndex slot : {3U, 1U, 2U}) table.evict(slot);
  EXPECT_EQ(table.find_empty(), 1u);
  table.begin_fill(1, {0, 4});
  EXPECT_EQ(table.find_empty(), 2u);
}

TEST(SlotTable, leases_add_up_and_the_last_release_frees_the_slot) {
  SlotTable table{1, 3, 4};
  table.begin_fill(0, some);
  table.finish_fill(0);
  table.lease(0);
  table.lease(0);
  EXPECT_EQ(table[0].leases, 2u);
  table.release(0);
  EXPECT_THROW(table.evict(0), std::logic_error);
  table.release(0);
  EXPECT_EQ(table[0].leases, 0u);
  table.evict(0);
  EXPECT_EQ(table.find(some), std::nullopt);
}

/// Where a slot is in its life, and which calls it allows there.
struct Stage {
  const char* name;
  void (*reach)(SlotTable&);
  bool begin_fill = false;
  bool finish_fill = false;
  bool abort_fill = false;
  bool evict = false;
  bool lease = false;
  bool release = false;
};

class SlotStage : public ::testing::TestWithParam<Stage> {};

TEST_P(SlotStage, allows_its_own_calls_and_throws_on_the_others_unchanged) {
  const Stage& stage = GetParam();
  const auto probe = [&](const char* call, bool allowed, auto act) {
    SlotTable table{2, 3, 4};
    stage.reach(table);
    const Slot before = table[0];
    if (allowed) {
      EXPECT_NO_THROW(act(table)) << call;
      return;
    }
    EXPECT_THROW(act(table), std::logic_error) << call;
    EXPECT_EQ(table[0].state, before.state) << call;
    EXPECT_EQ(table[0].expert, before.expert) << call;
    EXPECT_EQ(table[0].leases, before.leases) << call;
    EXPECT_EQ(table.find(other), std::nullopt) << call;
  };
  probe("begin_fill", stage.begin_fill, [](SlotTable& table) { table.begin_fill(0, other); });
  probe("finish_fill", stage.finish_fill, [](SlotTable& table) { table.finish_fill(0); });
  probe("abort_fill", stage.abort_fill, [](SlotTable& table) { table.abort_fill(0); });
  probe("evict", stage.evict, [](SlotTable& table) { table.evict(0); });
  probe("lease", stage.lease, [](SlotTable& table) { table.lease(0); });
  probe("release", stage.release, [](SlotTable& table) { table.release(0); });
}

void fill(SlotTable& table) { table.begin_fill(0, some); }
void make_resident(SlotTable& table) {
  fill(table);
  table.finish_fill(0);
}

INSTANTIATE_TEST_SUITE_P(
    all, SlotStage,
    ::testing::Values(Stage{.name = "empty", .reach = [](SlotTable&) {}, .begin_fill = true},
                      Stage{.name = "filling",
                            .reach = fill,
                            .finish_fill = true,
                            .abort_fill = true,
                            .lease = true},
                      Stage{
                          .name = "resident", .reach = make_resident, .evict = true, .lease = true},
                      Stage{.name = "leased_while_filling",
                            .reach =
                                [](SlotTable& table) {
                                  fill(table);
                                  table.lease(0);
                                },
                            .finish_fill = true,
                            .lease = true,
                            .release = true},
                      Stage{.name = "leased",
                            .reach =
                                [](SlotTable& table) {
                                  make_resident(table);
                                  table.lease(0);
                                },
                            .lease = true,
                            .release = true}),
    [](const auto& test) { return test.param.name; });

TEST(SlotTable, an_expert_never_has_two_slots) {
  SlotTable table{2, 3, 4};
  table.begin_fill(0, some);
  EXPECT_THROW(table.begin_fill(1, some), std::logic_error);
  table.finish_fill(0);
  EXPECT_THROW(table.begin_fill(1, some), std::logic_error);
  EXPECT_EQ(table[1].state, SlotState::empty);
}

TEST(SlotTable, a_slot_or_expert_that_does_not_exist_is_refused) {
  SlotTable table{2, 3, 4};
  EXPECT_THROW(table.begin_fill(2, some), std::logic_error);
  EXPECT_THROW(table.finish_fill(2), std::logic_error);
  EXPECT_THROW(table.abort_fill(2), std::logic_error);
  EXPECT_THROW(table.evict(2), std::logic_error);
  EXPECT_THROW(table.lease(2), std::logic_error);
  EXPECT_THROW(table.release(2), std::logic_error);
  EXPECT_THROW(static_cast<void>(table[2]), std::logic_error);
  EXPECT_THROW(static_cast<void>(table.find({3, 0})), std::logic_error);
  EXPECT_THROW(static_cast<void>(table.find({0, 4})), std::logic_error);  // not expert 0 of layer 1
  EXPECT_THROW(table.begin_fill(0, {0, 4}), std::logic_error);
}

}  // namespace
}  // namespace spmoe
