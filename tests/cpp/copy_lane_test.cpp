#include "runtime/copy_lane.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "base/error.hpp"
#include "device/buffer.hpp"
#include "device/host_device.hpp"

namespace spmoe {
namespace {

using What = BatchNotice::What;

/// Rejects every second call, as a device may, and lands the rest at once.
class RejectingStream final : public Stream {
 public:
  Fence submit(std::span<const CopyBatch> batches) override {
    const std::scoped_lock lock{mutex_};
    if (++calls_ % 2 == 0) throw DeviceError{"batch rejected"};
    const Fence first = submitted_ + 1;
    submitted_ += batches.size();
    return first;
  }
  void withdraw(Fence) override {}
  void promote(Fence) override {}
  void make_consumer_wait(std::uintptr_t, Fence) override {}
  BatchNotice next_notice() override {
    const std::scoped_lock lock{mutex_};
    return {++ended_, What::landed, 0, {}};
  }

 private:
  std::mutex mutex_;
  int calls_ = 0;
  Fence submitted_ = 0;
  Fence ended_ = 0;
};

class RejectingDevice final : public Device {
 public:
  std::string_view name() const noexcept override { return "rejecting"; }
  std::byte* allocate(std::size_t) override { return nullptr; }
  void deallocate(std::byte*, std::size_t) noexcept override {}
  std::unique_ptr<Stream> make_stream(StreamPriority) override {
    return std::make_unique<RejectingStream>();
  }
  std::byte* allocate_pinned(std::size_t) override { return nullptr; }
  void deallocate_pinned(std::byte*, std::size_t) noexcept override {}
  Mark mark(std::uintptr_t) override { return 0; }
  Mark read_back(std::byte*, const void*, std::size_t, std::uintptr_t, HostWait) override {
    return 0;
  }
  void wait(Mark) override {}
  std::string lost() const override { return {}; }
  LinkStats link_stats() const override { return {}; }
  void inject(const LinkFaults&) override {}
};

/// What a lane told of each fill, in order.
struct Log {
  std::mutex mutex;
  std::vector<CopyLane::FillNotice> told;

  CopyLane::OnNotice listener() {
    return [this](const CopyLane::FillNotice& ended) {
      const std::scoped_lock lock{mutex};
      told.push_back(ended);
    };
  }
};

/// Fills of slots that lie one behind the other in `buffer`, all with the bytes of `source`.
struct Fills {
  Fills(SlotIndex first, SlotIndex count, const Buffer& buffer,
        const std::vector<std::byte>& source) {
    for (SlotIndex slot = first; slot < first + count; ++slot) {
      fills.push_back({{0, 0}, slot, FillKind::demand});
      ops.push_back({buffer.data() + slot * source.size(), {source.data(), -1, 0, source.size()}});
    }
    for (const CopyOp& op : ops) batches.push_back({{&op, 1}});
  }
  void submit(CopyLane& lane) const { lane.submit(fills, batches); }

  std::vector<Fill> fills;
  std::vector<CopyOp> ops;
  std::vector<CopyBatch> batches;
};

TEST(CopyLane, tells_the_end_of_every_fill_before_it_goes) {
  const auto device = make_host_device({.copy_threads = 3});
  const Buffer buffer{*device, 20'000};
  const std::vector<std::byte> source(1000, std::byte{7});
  Log log;
  {
    CopyLane lane{*device, StreamPriority::demand, log.listener()};
    for (SlotIndex slot = 0; slot < 20; slot += 5) Fills{slot, 5, buffer, source}.submit(lane);
    lane.submit({}, {});
  }
  ASSERT_EQ(log.told.size(), 20u);
  std::ranges::sort(log.told, {}, [](const auto& ended) { return ended.fill.slot; });
  for (SlotIndex slot = 0; slot < 20; ++slot) {
    EXPECT_EQ(log.told[slot].fill.slot, slot);
    EXPECT_EQ(log.told[slot].batch.what, What::landed);
    EXPECT_EQ(log.told[slot].batch.bytes_moved, 1000u);
    EXPECT_LE(log.told[slot].start_s, log.told[slot].end_s);
  }
}

TEST(CopyLane, tells_a_failed_copy_with_its_reason_and_goes_on) {
  const auto device = make_host_device({.copy_threads = 1, .faults = {.fail_at_copy = 2}});
  const Buffer buffer{*device, 300};
  const std::vector<std::byte> source(100);
  Log log;
  {
    CopyLane lane{*device, StreamPriority::prefetch, log.listener()};
    Fills{0, 3, buffer, source}.submit(lane);
  }
  ASSERT_EQ(log.told.size(), 3u);
  EXPECT_EQ(log.told[0].batch.error, "");
  EXPECT_EQ(log.told[1].batch.error, "read error injected by a test");
  EXPECT_EQ(log.told[2].batch.error, "");
}

TEST(CopyLane, tells_what_the_device_rejects_like_any_failed_copy) {
  RejectingDevice device;
  Log log;
  {
    CopyLane lane{device, StreamPriority::demand, log.listener()};
    const std::vector<Fill> fills{{{0, 0}, 0, FillKind::demand}, {{0, 1}, 1, FillKind::demand}};
    const std::vector<CopyBatch> batches(2);
    for (int call = 0; call < 4; ++call) lane.submit(fills, batches);
  }
  ASSERT_EQ(log.told.size(), 8u);
  EXPECT_EQ(std::ranges::count(log.told, "batch rejected",
                               [](const auto& ended) { return ended.batch.error; }),
            4);
  EXPECT_EQ(std::ranges::count(log.told, What::failed,
                               [](const auto& ended) { return ended.batch.what; }),
            4);
}

TEST(CopyLane, withdraws_and_promotes_the_fill_of_a_slot_and_no_other) {
  // So slow that the first fill would take minutes.
  const auto device = make_host_device({.copy_threads = 1, .piece_bytes = 1000, .link_gbps = 1e-4});
  const std::vector<std::byte> large(10'000'000);
  const std::vector<std::byte> small(1000);
  const Buffer large_slot{*device, large.size()};
  const Buffer slots{*device, 4000};
  Log log;
  {
    CopyLane lane{*device, StreamPriority::prefetch, log.listener()};
    Fills{0, 1, large_slot, large}.submit(lane);
    Fills{1, 3, slots, small}.submit(lane);
    lane.promote(2);
    lane.promote(9);  // which it has not got
    lane.withdraw(9);
    lane.withdraw(3);
    const auto told = [&] {
      const std::scoped_lock lock{log.mutex};
      return log.told.size();
    };
    while (told() < 2) std::this_thread::yield();  // without the first, which was before them
    lane.withdraw(0);
  }
  ASSERT_EQ(log.told.size(), 4u);
  std::ranges::sort(log.told, {}, [](const auto& ended) { return ended.fill.slot; });
  EXPECT_EQ(log.told[0].batch.what, What::withdrawn);
  EXPECT_EQ(log.told[1].batch.what, What::landed);
  EXPECT_EQ(log.told[2].batch.what, What::landed);
  EXPECT_EQ(log.told[3].batch.what, What::withdrawn);
  EXPECT_EQ(log.told[3].batch.bytes_moved, 0u);
}

}  // namespace
}  // namespace spmoe
