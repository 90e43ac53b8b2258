#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <fstream>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/error.hpp"
#include "device/buffer.hpp"
#include "device/device.hpp"
#include "device/host_device.hpp"
#include "device/link_pacer.hpp"
#include "message_of.hpp"
#include "temp_file.hpp"

namespace spmoe {
namespace {

using Bytes = std::vector<std::byte>;

constexpr std::uint64_t piece_bytes = 4096;

Bytes random_bytes(std::size_t count, std::uint32_t seed) {
  std::mt19937 random{seed};
  Bytes bytes(count);
  std::ranges::generate(bytes, [&] { return static_cast<std::byte>(random()); });
  return bytes;
}

Extent in_memory(const Bytes& bytes) { return {bytes.data(), -1, 0, bytes.size()}; }

/// One implementation under the contract.
struct DeviceCase {
  const char* name;
  /// Cuts copies into `piece_bytes`, paces and plants faults if `has_link_options`.
  std::function<std::unique_ptr<Device>(const HostDeviceOptions&)> make;
  std::function<Bytes(const std::byte* device_memory, std::size_t bytes)> read;
  bool has_link_options;
};

Bytes read_host(const std::byte* memory, std::size_t bytes) { return {memory, memory + bytes}; }

// The contract of Device and Stream: every device is run through every case below.
class DeviceContract : public ::testing::TestWithParam<DeviceCase> {
 protected:
  static std::unique_ptr<Device> make(HostDeviceOptions options = {}) {
    options.piece_bytes = piece_bytes;
    return GetParam().make(options);
  }
  static Bytes read(const Buffer& buffer, std::size_t offset, std::size_t bytes) {
    return GetParam().read(buffer.data() + offset, bytes);
  }
};

TEST_P(DeviceContract, memory_is_aligned_and_apart) {
  const auto device = make();
  const Buffer first{*device, 10'000};
  const Buffer second{*device, 10'000};
  for (const Buffer* buffer : {&first, &second}) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer->data()) % 4096, 0u);
  }
  const Bytes ones = random_bytes(10'000, 1);
  const Bytes twos = random_bytes(10'000, 2);
  const auto stream = device->make_stream(StreamPriority::demand);
  stream->wait(stream->copy_batch(
      std::vector<CopyOp>{{first.data(), in_memory(ones)}, {second.data(), in_memory(twos)}}));
  EXPECT_EQ(read(first, 0, 10'000), ones);
  EXPECT_EQ(read(second, 0, 10'000), twos);
}

TEST_P(DeviceContract, memory_that_is_not_to_be_had_is_refused_with_its_size) {
  const auto device = make();
  const std::string message =
      message_of<OutOfMemory>([&] { static_cast<void>(device->allocate(std::size_t{1} << 62)); });
  EXPECT_NE(message.find("4194304.0 TiB"), std::string::npos) << message;
  EXPECT_NE(message.find("lower expert_memory"), std::string::npos) << message;
}

TEST_P(DeviceContract, copies_of_every_size_arrive_from_memory_and_from_files) {
  const auto device = make();
  const Bytes source = random_bytes(40'000, 3);
  const TempFile file{source};
  const auto stream = device->make_stream(StreamPriority::prefetch);
  for (const std::uint64_t bytes :
       {std::uint64_t{1}, piece_bytes - 1, piece_bytes, piece_bytes + 1, 5 * piece_bytes + 7}) {
    for (const bool from_file : {false, true}) {
      const Buffer buffer{*device, 40'000};
      const Extent where = from_file ? Extent{nullptr, file.descriptor(), 13, bytes}
                                     : Extent{source.data(), -1, 13, bytes};
      stream->wait(stream->copy_batch(std::vector<CopyOp>{{buffer.data() + 100, where}}));
      const Bytes wanted{source.begin() + 13, source.begin() + 13 + static_cast<long>(bytes)};
      EXPECT_EQ(read(buffer, 100, bytes), wanted) << bytes << (from_file ? " file" : " memory");
      EXPECT_EQ(read(buffer, 99, 1)[0], std::byte{0}) << "written before the destination";
      EXPECT_EQ(read(buffer, 100 + bytes, 1)[0], std::byte{0}) << "written past the destination";
    }
  }
}

TEST_P(DeviceContract, a_batch_of_many_copies_arrives_whole) {
  const auto device = make({.copy_threads = 3});
  const Bytes source = random_bytes(300'000, 4);
  const TempFile file{source};
  const Buffer buffer{*device, source.size()};
  std::vector<CopyOp> ops;
  std::mt19937 random{5};
  for (std::uint64_t start = 0; start < source.size();) {
    const auto bytes = std::min<std::uint64_t>(1 + random() % 3000, source.size() - start);
    ops.push_back({buffer.data() + start, random() % 2 == 0
                                              ? Extent{source.data(), -1, start, bytes}
                                              : Extent{nullptr, file.descriptor(), start, bytes}});
    start += bytes;
  }
  std::ranges::shuffle(ops, random);
  const auto stream = device->make_stream(StreamPriority::demand);
  stream->wait(stream->copy_batch(ops));
  EXPECT_EQ(read(buffer, 0, source.size()), source);
}

TEST_P(DeviceContract, fences_count_up_and_a_fence_covers_all_batches_before_it) {
  const auto device = make({.copy_threads = 3});
  const Bytes source = random_bytes(64 * piece_bytes, 6);
  const Buffer buffer{*device, source.size()};
  const auto stream = device->make_stream(StreamPriority::demand);
  Fence last = 0;
  for (std::uint64_t i = 0; i < 64; ++i) {
    const Extent extent{source.data(), -1, i * piece_bytes, piece_bytes};
    const Fence fence =
        stream->copy_batch(std::vector<CopyOp>{{buffer.data() + i * piece_bytes, extent}});
    EXPECT_GT(fence, last);
    last = fence;
  }
  stream->wait(last);
  EXPECT_EQ(read(buffer, 0, source.size()), source);
}

TEST_P(DeviceContract, waiting_for_nothing_or_for_the_past_returns) {
  const auto device = make();
  const Bytes source = random_bytes(100, 7);
  const Buffer buffer{*device, 100};
  const auto stream = device->make_stream(StreamPriority::demand);
  stream->wait(0);
  const Fence first = stream->copy_batch(std::vector<CopyOp>{{buffer.data(), in_memory(source)}});
  const Fence empty = stream->copy_batch({});
  EXPECT_GT(empty, first);
  stream->wait(empty);
  EXPECT_EQ(read(buffer, 0, 100), source);
  for (const Fence fence : {empty, first, first, Fence{0}}) stream->wait(fence);
}

TEST_P(DeviceContract, streams_do_not_wait_for_each_other) {
  const auto device = make();
  const auto one = device->make_stream(StreamPriority::prefetch);
  const auto two = device->make_stream(StreamPriority::demand);
  const Fence fence = one->copy_batch({});
  EXPECT_EQ(two->copy_batch({}), fence);  // each counts by itself
  two->wait(fence);
  one->wait(fence);
}

TEST_P(DeviceContract, any_number_of_threads_may_wait) {
  const auto device = make();
  const Bytes source = random_bytes(20 * piece_bytes, 8);
  const Buffer buffer{*device, source.size()};
  const auto stream = device->make_stream(StreamPriority::demand);
  const Fence fence = stream->copy_batch(std::vector<CopyOp>{{buffer.data(), in_memory(source)}});
  std::atomic<int> complete{0};
  std::vector<std::thread> waiters;
  for (int i = 0; i < 4; ++i) {
    waiters.emplace_back([&] {
      stream->wait(fence);
      complete += read(buffer, 0, source.size()) == source ? 1 : 0;
    });
  }
  for (std::thread& waiter : waiters) waiter.join();
  EXPECT_EQ(complete, 4);
}

TEST_P(DeviceContract, a_stream_may_go_while_its_copies_are_under_way) {
  const auto device = make();
  const Bytes source = random_bytes(50 * piece_bytes, 9);
  const Buffer buffer{*device, source.size()};
  {
    const auto stream = device->make_stream(StreamPriority::prefetch);
    static_cast<void>(stream->copy_batch(std::vector<CopyOp>{{buffer.data(), in_memory(source)}}));
  }
  EXPECT_EQ(read(buffer, 0, source.size()), source);
}

TEST_P(DeviceContract, a_file_that_is_too_short_fails_its_own_batch_once) {
  const auto device = make();
  const Bytes source = random_bytes(2 * piece_bytes, 10);
  const TempFile file{source};
  const Buffer buffer{*device, 8 * piece_bytes};
  const auto stream = device->make_stream(StreamPriority::demand);
  const auto copy = [&](std::size_t to_piece, std::uint64_t offset, std::uint64_t bytes) {
    return stream->copy_batch(std::vector<CopyOp>{
        {buffer.data() + to_piece * piece_bytes, {nullptr, file.descriptor(), offset, bytes}}});
  };
  const Fence good = copy(0, 0, piece_bytes);
  const Fence bad = copy(1, piece_bytes, 2 * piece_bytes);
  const Fence better = copy(3, 10, 2 * piece_bytes - 10);
  stream->wait(better);
  stream->wait(good);
  EXPECT_EQ(message_of<DeviceError>([&] { stream->wait(bad); }),
            "the file ends at byte 8192, 4096 bytes short: it was truncated after it was opened");
  stream->wait(bad);
  stream->wait(copy(5, 0, 2 * piece_bytes));
  EXPECT_EQ(read(buffer, 5 * piece_bytes, 2 * piece_bytes), source);
}

TEST_P(DeviceContract, a_batch_with_several_faults_tells_one_of_them) {
  const auto device = make();
  const TempFile file{random_bytes(10, 11)};
  const Buffer buffer{*device, 8 * piece_bytes};
  const auto stream = device->make_stream(StreamPriority::demand);
  const Fence bad = stream->copy_batch(
      std::vector<CopyOp>{{buffer.data(), {nullptr, file.descriptor(), 0, 8 * piece_bytes}}});
  EXPECT_THROW(stream->wait(bad), DeviceError);
  stream->wait(bad);
}

TEST_P(DeviceContract, a_descriptor_that_cannot_be_read_is_told_with_the_system_s_reason) {
  const auto device = make();
  const Buffer buffer{*device, 100};
  const auto stream = device->make_stream(StreamPriority::demand);
  const Fence bad = stream->copy_batch(std::vector<CopyOp>{{buffer.data(), {nullptr, -1, 7, 100}}});
  EXPECT_EQ(message_of<DeviceError>([&] { stream->wait(bad); }),
            "read of 100 bytes at offset 7 failed: Bad file descriptor");
}

TEST_P(DeviceContract, link_stats_count_the_bytes_that_arrived) {
  const auto device = make();
  const Bytes source = random_bytes(3 * piece_bytes + 5, 12);
  const TempFile file{source};
  const Buffer buffer{*device, 2 * source.size()};
  EXPECT_EQ(device->link_stats().bytes, 0u);
  const auto stream = device->make_stream(StreamPriority::demand);
  stream->wait(stream->copy_batch(std::vector<CopyOp>{
      {buffer.data(), in_memory(source)},
      {buffer.data() + source.size(), {nullptr, file.descriptor(), 0, source.size()}}}));
  EXPECT_EQ(device->link_stats().bytes, 2 * source.size());
  EXPECT_GT(device->link_stats().busy_s, 0.0);
  const Fence bad = stream->copy_batch(
      std::vector<CopyOp>{{buffer.data(), {nullptr, file.descriptor(), source.size(), 9}}});
  EXPECT_THROW(stream->wait(bad), DeviceError);
  EXPECT_EQ(device->link_stats().bytes, 2 * source.size());
}

TEST_P(DeviceContract, a_planted_fault_fails_one_copy_and_no_other) {
  if (!GetParam().has_link_options) GTEST_SKIP() << "plants no faults";
  const auto device = make({.copy_threads = 1, .faults = {.fail_at_copy = 3}});
  const Bytes source = random_bytes(piece_bytes, 13);
  const Buffer buffer{*device, 5 * piece_bytes};
  const auto stream = device->make_stream(StreamPriority::demand);
  std::vector<Fence> fences;
  for (std::size_t i = 0; i < 5; ++i) {
    fences.push_back(stream->copy_batch(
        std::vector<CopyOp>{{buffer.data() + i * piece_bytes, in_memory(source)}}));
  }
  for (std::size_t i = 0; i < 5; ++i) {
    if (i == 2) {
      EXPECT_EQ(message_of<DeviceError>([&] { stream->wait(fences[i]); }),
                "read error injected by a test");
    } else {
      stream->wait(fences[i]);
      EXPECT_EQ(read(buffer, i * piece_bytes, piece_bytes), source) << i;
    }
  }
  EXPECT_EQ(device->link_stats().bytes, 4 * piece_bytes);
}

TEST_P(DeviceContract, a_demand_goes_ahead_of_the_prefetches_that_wait) {
  if (!GetParam().has_link_options) GTEST_SKIP() << "cannot be slowed";
  // Slow enough that the link is still busy with prefetches when the demand comes. The fault in
  // the last copy then tells which was served last.
  constexpr std::uint64_t prefetch_pieces = 24;
  const auto device =
      make({.copy_threads = 1, .link_gbps = 4e-4, .faults = {.fail_at_copy = prefetch_pieces + 1}});
  const Bytes source = random_bytes(prefetch_pieces * piece_bytes, 14);
  const Buffer buffer{*device, (prefetch_pieces + 1) * piece_bytes};
  const auto prefetch = device->make_stream(StreamPriority::prefetch);
  const auto demand = device->make_stream(StreamPriority::demand);
  const Fence later = prefetch->copy_batch(std::vector<CopyOp>{{buffer.data(), in_memory(source)}});
  const Fence sooner = demand->copy_batch(
      std::vector<CopyOp>{{buffer.data() + source.size(), {source.data(), -1, 0, piece_bytes}}});
  demand->wait(sooner);
  EXPECT_THROW(prefetch->wait(later), DeviceError);
  EXPECT_EQ(device->link_stats().bytes, prefetch_pieces * piece_bytes);
}

TEST_P(DeviceContract, random_delays_change_no_byte) {
  if (!GetParam().has_link_options) GTEST_SKIP() << "cannot be slowed";
  for (const std::uint32_t seed : {1U, 2U, 3U}) {
    const auto device = make({.copy_threads = 4, .faults = {0, seed, 300}});
    const Bytes source = random_bytes(40 * piece_bytes, seed);
    const Buffer buffer{*device, source.size()};
    const auto stream = device->make_stream(StreamPriority::demand);
    stream->wait(stream->copy_batch(std::vector<CopyOp>{{buffer.data(), in_memory(source)}}));
    EXPECT_EQ(read(buffer, 0, source.size()), source) << "seed " << seed;
  }
}

INSTANTIATE_TEST_SUITE_P(all, DeviceContract,
                         ::testing::Values(DeviceCase{"host", make_host_device, read_host, true}),
                         [](const auto& test) { return test.param.name; });

TEST(HostDevice, goes_by_its_name) { EXPECT_EQ(make_host_device({})->name(), "host"); }

TEST(HostDevice, refuses_more_memory_than_the_machine_has) {
  std::ifstream setting{"/proc/sys/vm/overcommit_memory"};
  if (std::string policy; setting >> policy && policy == "1") {
    GTEST_SKIP() << "this system promises any amount of memory";
  }
  const auto memory = static_cast<std::size_t>(::sysconf(_SC_PHYS_PAGES)) *
                      static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  const auto device = make_host_device({});
  EXPECT_THROW(static_cast<void>(device->allocate(16 * memory)), OutOfMemory);
}

TEST(HostDevice, refuses_options_that_make_no_link) {
  const std::string message =
      "copy_threads and piece_bytes must be at least 1 and link_gbps at least 0";
  for (const HostDeviceOptions& options :
       {HostDeviceOptions{.copy_threads = 0}, HostDeviceOptions{.piece_bytes = 0},
        HostDeviceOptions{.link_gbps = -1}, HostDeviceOptions{.link_gbps = std::nan("")}}) {
    EXPECT_EQ(message_of<InvalidArgument>([&] { static_cast<void>(make_host_device(options)); }),
              message);
  }
}

TEST(HostDevice, faults_can_be_planted_later_and_count_from_then) {
  const auto device = make_host_device({.copy_threads = 1, .faults = {.fail_at_copy = 3}});
  const Bytes source = random_bytes(100, 15);
  const Buffer buffer{*device, 100};
  const auto stream = device->make_stream(StreamPriority::demand);
  const auto copy = [&] {
    stream->wait(stream->copy_batch(std::vector<CopyOp>{{buffer.data(), in_memory(source)}}));
  };
  copy();
  copy();
  device->inject({.fail_at_copy = 2});
  copy();
  EXPECT_THROW(copy(), DeviceError);
  copy();
  device->inject({.fail_at_copy = 1});
  EXPECT_THROW(copy(), DeviceError);
  device->inject({});
  copy();
}

TEST(LinkPacer, lays_the_pieces_behind_each_other_on_the_link) {
  LinkPacer pacer{1.0, {}};
  const auto first = pacer.admit(1'000'000'000);
  const auto second = pacer.admit(500'000'000);
  const auto third = pacer.admit(2'000'000'000);
  EXPECT_EQ(second.until - first.until, std::chrono::milliseconds{500});
  EXPECT_EQ(third.until - second.until, std::chrono::seconds{2});
}

TEST(LinkPacer, holds_nobody_when_the_link_is_not_paced) {
  LinkPacer pacer{0, {}};
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(pacer.admit(std::uint64_t{1} << 40).until, LinkPacer::Clock::time_point{});
  }
}

TEST(LinkPacer, fails_the_nth_piece_once) {
  LinkPacer pacer{0, {.fail_at_copy = 2}};
  EXPECT_FALSE(pacer.admit(1).fail);
  EXPECT_TRUE(pacer.admit(1).fail);
  EXPECT_FALSE(pacer.admit(1).fail);
  pacer.inject({.fail_at_copy = 1});
  EXPECT_TRUE(pacer.admit(1).fail);
  EXPECT_FALSE(pacer.admit(1).fail);
}

TEST(LinkPacer, delays_are_the_same_for_the_same_seed) {
  // Each piece takes a minute of link, so that only the seed tells the pacers apart.
  constexpr std::uint64_t minute = 60'000'000'000;
  const auto gaps = [](std::uint32_t seed) {
    LinkPacer pacer{1.0, {.delay_seed = seed, .max_delay_us = 1000}};
    const auto first = pacer.admit(minute).until;
    std::vector<LinkPacer::Clock::duration> result;
    for (int i = 0; i < 20; ++i) result.push_back(pacer.admit(minute).until - first);
    return result;
  };
  EXPECT_EQ(gaps(1), gaps(1));
  EXPECT_NE(gaps(1), gaps(2));
}

}  // namespace
}  // namespace spmoe
