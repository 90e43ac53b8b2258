#include "runtime/copy_lane.hpp"

#include <gtest/gtest.h>

#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "base/error.hpp"
#include "device/buffer.hpp"
#include "device/host_device.hpp"

namespace spmoe {
namespace {

/// Rejects every second batch, as a device may.
class RejectingStream final : public Stream {
 public:
  Fence copy_batch(std::span<const CopyOp>) override {
    if (++batches_ % 2 == 0) throw DeviceError{"batch rejected"};
    return ++fence_;
  }
  void wait(Fence) override {}

 private:
  int batches_ = 0;
  Fence fence_ = 0;
};

class RejectingDevice final : public Device {
 public:
  std::string_view name() const noexcept override { return "rejecting"; }
  std::byte* allocate(std::size_t) override { return nullptr; }
  void deallocate(std::byte*, std::size_t) noexcept override {}
  std::unique_ptr<Stream> make_stream(StreamPriority) override {
    return std::make_unique<RejectingStream>();
  }
  LinkStats link_stats() const override { return {}; }
};

/// What a lane told: slot and error of each fill, in order.
struct Log {
  std::mutex mutex;
  std::vector<std::pair<SlotIndex, std::string>> told;

  CopyLane::OnLanded listener() {
    return [this](const CopyLane::Landed& landed) {
      const std::scoped_lock lock{mutex};
      told.emplace_back(landed.fill.slot, landed.error);
    };
  }
};

Fill fill_of(SlotIndex slot) { return {{0, 0}, slot, FillKind::demand}; }

TEST(CopyLane, tells_the_end_of_every_fill_in_order_before_it_goes) {
  const auto device = make_host_device({.copy_threads = 3});
  const Buffer buffer{*device, 20'000};
  const std::vector<std::byte> source(1000, std::byte{7});
  Log log;
  {
    CopyLane lane{*device, StreamPriority::demand, log.listener()};
    for (SlotIndex slot = 0; slot < 20; ++slot) {
      const CopyOp op{buffer.data() + slot * 1000, {source.data(), -1, 0, 1000}};
      lane.submit(fill_of(slot), {&op, 1});
    }
  }
  ASSERT_EQ(log.told.size(), 20u);
  for (SlotIndex slot = 0; slot < 20; ++slot) {
    EXPECT_EQ(log.told[slot], std::pair(slot, std::string{}));
  }
}

TEST(CopyLane, tells_a_failed_copy_with_its_reason_and_goes_on) {
  const auto device = make_host_device({.copy_threads = 1, .faults = {.fail_at_copy = 2}});
  const Buffer buffer{*device, 100};
  const std::vector<std::byte> source(100);
  Log log;
  {
    CopyLane lane{*device, StreamPriority::prefetch, log.listener()};
    for (SlotIndex slot = 0; slot < 3; ++slot) {
      const CopyOp op{buffer.data(), {source.data(), -1, 0, 1}};
      lane.submit(fill_of(slot), {&op, 1});
    }
  }
  ASSERT_EQ(log.told.size(), 3u);
  EXPECT_EQ(log.told[0].second, "");
  EXPECT_EQ(log.told[1].second, "read error injected by a test");
  EXPECT_EQ(log.told[2].second, "");
}

TEST(CopyLane, tells_a_batch_that_the_device_rejects_like_any_failed_copy) {
  RejectingDevice device;
  Log log;
  {
    CopyLane lane{device, StreamPriority::demand, log.listener()};
    for (SlotIndex slot = 0; slot < 4; ++slot) lane.submit(fill_of(slot), {});
  }
  ASSERT_EQ(log.told.size(), 4u);
  for (SlotIndex slot = 0; slot < 4; ++slot) {
    EXPECT_EQ(log.told[slot], std::pair(slot, std::string{slot % 2 == 0 ? "" : "batch rejected"}));
  }
}

TEST(CopyLane, a_fill_is_in_flight_until_it_is_told) {
  const auto device = make_host_device({});
  std::mutex gate;
  std::unique_lock closed{gate};
  CopyLane lane{*device, StreamPriority::demand,
                [&](const CopyLane::Landed&) { const std::scoped_lock wait_for_the_test{gate}; }};
  EXPECT_EQ(lane.in_flight(), 0u);
  for (SlotIndex slot = 0; slot < 3; ++slot) lane.submit(fill_of(slot), {});
  // The worker tells of the first and waits at the gate.
  EXPECT_GE(lane.in_flight(), 2u);
  EXPECT_LE(lane.in_flight(), 3u);
  closed.unlock();
}

}  // namespace
}  // namespace spmoe
