#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/error.hpp"
#include "device/buffer.hpp"
#include "device/device.hpp"
#include "message_of.hpp"
#include "temp_file.hpp"

namespace spmoe {

using Bytes = std::vector<std::byte>;

constexpr std::uint64_t piece_bytes = 4096;

inline Bytes random_bytes(std::size_t count, std::uint32_t seed) {
  std::mt19937 random{seed};
  Bytes bytes(count);
  std::ranges::generate(bytes, [&] { return static_cast<std::byte>(random()); });
  return bytes;
}

inline Extent in_memory(const Bytes& bytes) { return {bytes.data(), -1, 0, bytes.size()}; }

using Ops = std::vector<CopyOp>;
using What = BatchNotice::What;

inline Fence submit(Stream& stream, const Ops& ops) {
  const CopyBatch batch{ops, 0};
  return stream.submit({&batch, 1});
}

/// The next end that the stream tells.
inline BatchNotice next_end(Stream& stream) {
  BatchNotice notice = stream.next_notice();
  while (notice.what == What::issued) notice = stream.next_notice();
  return notice;
}

/// Copies in a stream that is idle. Returns the end.
inline BatchNotice copy(Stream& stream, const Ops& ops) {
  const Fence fence = submit(stream, ops);
  BatchNotice end = next_end(stream);
  EXPECT_EQ(end.fence, fence);
  return end;
}

/// The next `count` ends that the stream tells, by fence.
inline std::map<Fence, BatchNotice> ends_of(Stream& stream, std::size_t count) {
  std::map<Fence, BatchNotice> ends;
  for (std::size_t i = 0; i < count; ++i) {
    BatchNotice end = next_end(stream);
    const Fence fence = end.fence;
    EXPECT_TRUE(ends.emplace(fence, std::move(end)).second) << "told twice";
  }
  return ends;
}

/// One implementation under the contract.
struct DeviceCase {
  const char* name;
  /// Makes what the device needs, for the length of a test.
  std::function<std::shared_ptr<void>()> begin;
  /// Cuts copies into `piece_bytes`, paces and plants faults if `has_link_options`.
  std::function<std::unique_ptr<Device>(const DeviceOptions&)> make;
  std::function<Bytes(const std::byte* device_memory, std::size_t bytes)> read;
  bool has_link_options;
};

inline Bytes read_host(const std::byte* memory, std::size_t bytes) {
  return {memory, memory + bytes};
}

// The contract of Device and Stream: every device is run through every case below.
class DeviceContract : public ::testing::TestWithParam<DeviceCase> {
 protected:
  static std::unique_ptr<Device> make(DeviceOptions options = {}) {
    options.piece_bytes = piece_bytes;
    return GetParam().make(options);
  }
  static Bytes read(const Buffer& buffer, std::size_t offset, std::size_t bytes) {
    return GetParam().read(buffer.data() + offset, bytes);
  }

 private:
  std::shared_ptr<void> session_ = GetParam().begin();
};

/// A link so slow that what is submitted stays under way for the length of a test, unless it is
/// withdrawn: a piece a hundredth of a second.
constexpr double slow_gbps = 4e-4;
constexpr std::size_t many_pieces = 1000;

TEST_P(DeviceContract, memory_is_aligned_and_apart) {
  const auto device = make();
  const Buffer first{*device, 10'000};
  const Buffer second{*device, 10'000};
  for (const Buffer* buffer : {&first, &second}) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer->data()) % 256, 0u);
  }
  const Bytes ones = random_bytes(10'000, 1);
  const Bytes twos = random_bytes(10'000, 2);
  const auto stream = device->make_stream(StreamPriority::demand);
  copy(*stream, {{first.data(), in_memory(ones)}, {second.data(), in_memory(twos)}});
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
      const BatchNotice end = copy(*stream, {{buffer.data() + 100, where}});
      EXPECT_EQ(end.what, What::landed);
      EXPECT_EQ(end.bytes_moved, bytes);
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
  EXPECT_EQ(copy(*stream, ops).bytes_moved, source.size());
  EXPECT_EQ(read(buffer, 0, source.size()), source);
}

TEST_P(DeviceContract, fences_count_up_over_the_batches_of_every_call) {
  const auto device = make({.copy_threads = 3});
  const Bytes source = random_bytes(64 * piece_bytes, 6);
  const Buffer buffer{*device, source.size()};
  const auto stream = device->make_stream(StreamPriority::demand);
  Ops ops;
  for (std::uint64_t i = 0; i < 64; ++i) {
    ops.push_back({buffer.data() + i * piece_bytes, {source.data(), -1, i * piece_bytes, 4096}});
  }
  const std::span<const CopyOp> all{ops};
  Fence next = 1;
  for (std::size_t first = 0, count = 1; first < 64; first += count, count = 63 / 3) {
    std::vector<CopyBatch> batches;
    for (std::size_t i = first; i < first + count; ++i) batches.push_back({all.subspan(i, 1)});
    EXPECT_EQ(stream->submit(batches), next);
    next += count;
  }
  const auto ends = ends_of(*stream, 64);
  EXPECT_EQ(ends.begin()->first, 1u);
  EXPECT_EQ(ends.rbegin()->first, 64u);
  for (const auto& [fence, end] : ends) {
    EXPECT_EQ(end.what, What::landed);
    EXPECT_EQ(end.bytes_moved, piece_bytes);
    EXPECT_EQ(end.error, "");
  }
  EXPECT_EQ(read(buffer, 0, source.size()), source);
}

TEST_P(DeviceContract, a_batch_has_landed_when_its_end_is_told_whatever_the_others_do) {
  const auto device = make({.copy_threads = 3});
  constexpr std::size_t count = 30;
  const Bytes source = random_bytes(count * piece_bytes, 7);
  const Buffer buffer{*device, source.size()};
  const auto stream = device->make_stream(StreamPriority::demand);
  Ops ops;
  std::vector<CopyBatch> batches;
  for (std::uint64_t i = 0; i < count; ++i) {
    ops.push_back(
        {buffer.data() + i * piece_bytes, {source.data(), -1, i * piece_bytes, piece_bytes}});
  }
  for (const CopyOp& op : ops) batches.push_back({{&op, 1}});
  const Fence first = stream->submit(batches);
  ops.clear();  // the spans need not outlive the call
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t at = (next_end(*stream).fence - first) * piece_bytes;
    const Bytes wanted{source.begin() + static_cast<long>(at),
                       source.begin() + static_cast<long>(at + piece_bytes)};
    EXPECT_EQ(read(buffer, at, piece_bytes), wanted);
  }
}

TEST_P(DeviceContract, a_batch_without_a_byte_ends_like_any_other) {
  const auto device = make();
  const Bytes source = random_bytes(100, 7);
  const Buffer buffer{*device, 100};
  const auto stream = device->make_stream(StreamPriority::demand);
  const Ops ops{{buffer.data(), in_memory(source)}, {buffer.data(), {source.data(), -1, 0, 0}}};
  const std::span<const CopyOp> all{ops};
  const std::vector<CopyBatch> batches{{all.first(1)}, {}, {all.last(1)}};
  EXPECT_EQ(stream->submit(batches), 1u);
  auto ends = ends_of(*stream, 3);
  for (const Fence fence : {1U, 2U, 3U}) {
    EXPECT_EQ(ends.at(fence).what, What::landed);
    EXPECT_EQ(ends.at(fence).bytes_moved, fence == 1 ? 100u : 0u);
  }
  EXPECT_EQ(read(buffer, 0, 100), source);
}

TEST_P(DeviceContract, streams_do_not_wait_for_each_other) {
  const auto device = make();
  const auto one = device->make_stream(StreamPriority::prefetch);
  const auto two = device->make_stream(StreamPriority::demand);
  const Fence fence = submit(*one, {});
  EXPECT_EQ(submit(*two, {}), fence);  // each counts by itself
  EXPECT_EQ(next_end(*two).fence, fence);
  EXPECT_EQ(next_end(*one).fence, fence);
}

TEST_P(DeviceContract, any_number_of_threads_may_wait_and_each_end_is_told_to_one) {
  const auto device = make();
  const Bytes source = random_bytes(20 * piece_bytes, 8);
  const Buffer buffer{*device, source.size()};
  const auto stream = device->make_stream(StreamPriority::demand);
  std::atomic<Fence> told{0};
  std::vector<std::thread> waiters;
  const Ops ops{{buffer.data(), in_memory(source)}};
  static_cast<void>(stream->submit(std::vector<CopyBatch>{{ops}, {}, {}, {}}));
  for (int i = 0; i < 4; ++i) {
    waiters.emplace_back([&] { told += next_end(*stream).fence; });
  }
  for (std::thread& waiter : waiters) waiter.join();
  EXPECT_EQ(told, 1u + 2 + 3 + 4);
  EXPECT_EQ(read(buffer, 0, source.size()), source);
}

TEST_P(DeviceContract, a_stream_may_go_while_its_copies_are_under_way) {
  const auto device = make();
  const Bytes source = random_bytes(50 * piece_bytes, 9);
  const Buffer buffer{*device, source.size()};
  {
    const auto stream = device->make_stream(StreamPriority::prefetch);
    static_cast<void>(submit(*stream, {{buffer.data(), in_memory(source)}}));
  }
  EXPECT_EQ(read(buffer, 0, source.size()), source);
}

TEST_P(DeviceContract, a_file_that_is_too_short_fails_its_own_batch_once) {
  const auto device = make();
  const Bytes source = random_bytes(2 * piece_bytes, 10);
  const TempFile file{source};
  const Buffer buffer{*device, 8 * piece_bytes};
  const auto stream = device->make_stream(StreamPriority::demand);
  const auto start = [&](std::size_t to_piece, std::uint64_t offset, std::uint64_t bytes) {
    return submit(*stream, {{buffer.data() + to_piece * piece_bytes,
                             {nullptr, file.descriptor(), offset, bytes}}});
  };
  const Fence good = start(0, 0, piece_bytes);
  const Fence bad = start(1, piece_bytes, 2 * piece_bytes);
  const Fence better = start(3, 10, 2 * piece_bytes - 10);
  auto ends = ends_of(*stream, 3);
  EXPECT_EQ(ends.at(good).what, What::landed);
  EXPECT_EQ(ends.at(better).what, What::landed);
  EXPECT_EQ(ends.at(bad).what, What::failed);
  EXPECT_EQ(ends.at(bad).bytes_moved, piece_bytes);
  EXPECT_EQ(ends.at(bad).error,
            "the file ends at byte 8192, 4096 bytes short: it was truncated after it was opened");
  static_cast<void>(start(5, 0, 2 * piece_bytes));
  EXPECT_EQ(next_end(*stream).what, What::landed);
  EXPECT_EQ(read(buffer, 5 * piece_bytes, 2 * piece_bytes), source);
}

TEST_P(DeviceContract, a_batch_with_several_faults_tells_one_of_them) {
  const auto device = make();
  const TempFile file{random_bytes(10, 11)};
  const Buffer buffer{*device, 8 * piece_bytes};
  const auto stream = device->make_stream(StreamPriority::demand);
  const BatchNotice bad =
      copy(*stream, {{buffer.data(), {nullptr, file.descriptor(), 0, 8 * piece_bytes}}});
  EXPECT_EQ(bad.what, What::failed);
  EXPECT_EQ(bad.bytes_moved, 0u);
  EXPECT_NE(bad.error, "");
}

TEST_P(DeviceContract, a_descriptor_that_cannot_be_read_is_told_with_the_system_s_reason) {
  const auto device = make();
  const Buffer buffer{*device, 100};
  const auto stream = device->make_stream(StreamPriority::demand);
  EXPECT_EQ(copy(*stream, {{buffer.data(), {nullptr, -1, 7, 100}}}).error,
            "read of 100 bytes at offset 7 failed: Bad file descriptor");
}

TEST_P(DeviceContract, link_stats_count_the_bytes_that_arrived) {
  const auto device = make();
  const Bytes source = random_bytes(3 * piece_bytes + 5, 12);
  const TempFile file{source};
  const Buffer buffer{*device, 2 * source.size()};
  EXPECT_EQ(device->link_stats().bytes, 0u);
  const auto stream = device->make_stream(StreamPriority::demand);
  copy(*stream, {{buffer.data(), in_memory(source)},
                 {buffer.data() + source.size(), {nullptr, file.descriptor(), 0, source.size()}}});
  EXPECT_EQ(device->link_stats().bytes, 2 * source.size());
  EXPECT_GT(device->link_stats().busy_s, 0.0);
  const BatchNotice bad =
      copy(*stream, {{buffer.data(), {nullptr, file.descriptor(), source.size(), 9}}});
  EXPECT_EQ(bad.what, What::failed);
  EXPECT_EQ(device->link_stats().bytes, 2 * source.size());
}

TEST_P(DeviceContract, a_planted_fault_fails_one_copy_and_no_other) {
  if (!GetParam().has_link_options) GTEST_SKIP() << "plants no faults";
  const auto device = make({.copy_threads = 1, .faults = {.fail_at_copy = 3}});
  const Bytes source = random_bytes(piece_bytes, 13);
  const Buffer buffer{*device, 5 * piece_bytes};
  const auto stream = device->make_stream(StreamPriority::demand);
  for (std::size_t i = 0; i < 5; ++i) {
    static_cast<void>(submit(*stream, {{buffer.data() + i * piece_bytes, in_memory(source)}}));
  }
  for (const auto& [fence, end] : ends_of(*stream, 5)) {
    if (fence == 3) {
      EXPECT_EQ(end.error, "read error injected by a test");
    } else {
      EXPECT_EQ(end.what, What::landed);
      EXPECT_EQ(read(buffer, (fence - 1) * piece_bytes, piece_bytes), source) << fence;
    }
  }
  EXPECT_EQ(device->link_stats().bytes, 4 * piece_bytes);
}

TEST_P(DeviceContract, a_demand_goes_ahead_of_the_prefetches_that_wait) {
  if (!GetParam().has_link_options) GTEST_SKIP() << "cannot be slowed";
  const auto device = make({.copy_threads = 1, .link_gbps = slow_gbps});
  const Bytes source = random_bytes(many_pieces * piece_bytes, 14);
  const Buffer buffer{*device, source.size() + piece_bytes};
  const auto prefetch = device->make_stream(StreamPriority::prefetch);
  const auto demand = device->make_stream(StreamPriority::demand);
  const Fence waiting = submit(*prefetch, {{buffer.data(), in_memory(source)}});
  const BatchNotice sooner =
      copy(*demand, {{buffer.data() + source.size(), {source.data(), -1, 0, piece_bytes}}});
  EXPECT_EQ(sooner.what, What::landed);
  EXPECT_LE(device->link_stats().prefetch_before_demand, piece_bytes);
  prefetch->withdraw(waiting);
  EXPECT_EQ(next_end(*prefetch).what, What::withdrawn);
}

TEST_P(DeviceContract, a_withdrawn_batch_ends_with_what_had_begun) {
  if (!GetParam().has_link_options) GTEST_SKIP() << "cannot be slowed";
  const auto device = make({.copy_threads = 2, .link_gbps = slow_gbps});
  const Bytes source = random_bytes(many_pieces * piece_bytes, 16);
  const Buffer buffer{*device, source.size()};
  for (const StreamPriority priority : {StreamPriority::prefetch, StreamPriority::demand}) {
    const auto stream = device->make_stream(priority);
    const std::uint64_t before = device->link_stats().bytes;
    const Fence fence = submit(*stream, {{buffer.data(), in_memory(source)}});
    stream->withdraw(fence);
    const BatchNotice end = next_end(*stream);
    EXPECT_EQ(end.fence, fence);
    EXPECT_EQ(end.what, What::withdrawn);
    EXPECT_EQ(end.error, "");
    EXPECT_LT(end.bytes_moved, source.size());
    EXPECT_EQ(device->link_stats().bytes - before, end.bytes_moved);
    // Nothing is written any more: the destination may be another's at once.
    const Bytes other = random_bytes(piece_bytes, 17);
    copy(*stream, {{buffer.data(), in_memory(other)}});
    EXPECT_EQ(read(buffer, 0, piece_bytes), other);
    stream->withdraw(fence);  // it has ended
    stream->withdraw(fence + 1);
    EXPECT_EQ(copy(*stream, {{buffer.data(), in_memory(other)}}).what, What::landed);
  }
}

TEST_P(DeviceContract, withdrawing_one_batch_lets_the_others_land) {
  if (!GetParam().has_link_options) GTEST_SKIP() << "cannot be slowed";
  const auto device = make({.copy_threads = 1, .link_gbps = slow_gbps});
  const Bytes source = random_bytes(many_pieces * piece_bytes, 18);
  const Buffer buffer{*device, source.size() + 2 * piece_bytes};
  const auto stream = device->make_stream(StreamPriority::prefetch);
  const Ops ops{{buffer.data(), in_memory(source)},
                {buffer.data() + source.size(), {source.data(), -1, 0, piece_bytes}},
                {buffer.data() + source.size() + piece_bytes, {source.data(), -1, 0, piece_bytes}}};
  const std::span<const CopyOp> all{ops};
  const Fence first = stream->submit(
      std::vector<CopyBatch>{{all.subspan(0, 1)}, {all.subspan(1, 1)}, {all.subspan(2, 1)}});
  stream->withdraw(first + 1);  // waits behind the first
  const BatchNotice unbegun = next_end(*stream);
  EXPECT_EQ(unbegun.fence, first + 1);
  EXPECT_EQ(unbegun.what, What::withdrawn);
  EXPECT_EQ(unbegun.bytes_moved, 0u);
  stream->withdraw(first);
  EXPECT_EQ(next_end(*stream).fence, first);
  const BatchNotice last = next_end(*stream);
  EXPECT_EQ(last.fence, first + 2);
  EXPECT_EQ(last.what, What::landed);
  EXPECT_EQ(read(buffer, source.size() + piece_bytes, piece_bytes),
            (Bytes{source.begin(), source.begin() + piece_bytes}));
  EXPECT_EQ(read(buffer, source.size(), piece_bytes), Bytes(piece_bytes));
}

TEST_P(DeviceContract, a_withdrawn_batch_with_a_fault_has_failed) {
  if (!GetParam().has_link_options) GTEST_SKIP() << "plants no faults";
  const auto device =
      make({.copy_threads = 1, .link_gbps = slow_gbps, .faults = {.fail_at_copy = 1}});
  const Bytes source = random_bytes(many_pieces * piece_bytes, 19);
  const Buffer buffer{*device, source.size()};
  const auto stream = device->make_stream(StreamPriority::prefetch);
  const Fence fence = submit(*stream, {{buffer.data(), in_memory(source)}});
  // Once its second piece has arrived, its first has failed.
  while (device->link_stats().bytes == 0) std::this_thread::yield();
  stream->withdraw(fence);
  const BatchNotice end = next_end(*stream);
  EXPECT_EQ(end.what, What::failed);
  EXPECT_EQ(end.error, "read error injected by a test");
  EXPECT_LT(end.bytes_moved, source.size());
}

TEST_P(DeviceContract, withdrawing_at_any_moment_accounts_for_every_byte) {
  if (!GetParam().has_link_options) GTEST_SKIP() << "cannot be slowed";
  std::mt19937 random{20};
  const auto device = make({.copy_threads = 3, .faults = {0, 20, 50}});
  const Bytes source = random_bytes(8 * piece_bytes, 20);
  const Buffer buffer{*device, source.size()};
  const auto stream = device->make_stream(StreamPriority::prefetch);
  std::uint64_t moved = 0;
  for (int round = 0; round < 200; ++round) {
    const Fence fence = submit(*stream, {{buffer.data(), in_memory(source)}});
    for (auto spin = random() % 2000; spin > 0; --spin) static_cast<void>(random());
    if (round % 3 == 0) stream->promote(fence);
    stream->withdraw(fence);
    const BatchNotice end = next_end(*stream);
    EXPECT_EQ(end.fence, fence);
    EXPECT_EQ(end.what == What::landed, end.bytes_moved == source.size());
    moved += end.bytes_moved;
    EXPECT_EQ(device->link_stats().bytes, moved);
  }
}

TEST_P(DeviceContract, a_promoted_batch_overtakes_the_prefetches_before_it) {
  if (!GetParam().has_link_options) GTEST_SKIP() << "cannot be slowed";
  const auto device = make({.copy_threads = 2, .link_gbps = slow_gbps});
  const Bytes source = random_bytes(many_pieces * piece_bytes, 21);
  const Buffer buffer{*device, source.size() + 3 * piece_bytes};
  const auto stream = device->make_stream(StreamPriority::prefetch);
  const Fence before = submit(*stream, {{buffer.data(), in_memory(source)}});
  const Fence wanted =
      submit(*stream, {{buffer.data() + source.size(), {source.data(), -1, 5, 3 * piece_bytes}}});
  stream->promote(wanted);
  const BatchNotice end = next_end(*stream);
  EXPECT_EQ(end.fence, wanted);
  EXPECT_EQ(end.what, What::landed);
  EXPECT_EQ(read(buffer, source.size(), 3 * piece_bytes),
            (Bytes{source.begin() + 5, source.begin() + 5 + 3 * piece_bytes}));
  // Two threads at half a piece each.
  EXPECT_LE(device->link_stats().prefetch_before_demand, piece_bytes);
  stream->promote(wanted);  // it has ended
  stream->withdraw(before);
  EXPECT_EQ(next_end(*stream).what, What::withdrawn);
}

TEST_P(DeviceContract, a_promoted_batch_may_be_withdrawn) {
  if (!GetParam().has_link_options) GTEST_SKIP() << "cannot be slowed";
  const auto device = make({.copy_threads = 1, .link_gbps = slow_gbps});
  const Bytes source = random_bytes(many_pieces * piece_bytes, 22);
  const Buffer buffer{*device, source.size()};
  const auto stream = device->make_stream(StreamPriority::prefetch);
  const Fence fence = submit(*stream, {{buffer.data(), in_memory(source)}});
  stream->promote(fence);
  stream->promote(fence);
  stream->withdraw(fence);
  EXPECT_EQ(next_end(*stream).what, What::withdrawn);
}

TEST_P(DeviceContract, random_delays_change_no_byte) {
  if (!GetParam().has_link_options) GTEST_SKIP() << "cannot be slowed";
  for (const std::uint32_t seed : {1U, 2U, 3U}) {
    const auto device = make({.copy_threads = 4, .faults = {0, seed, 300}});
    const Bytes source = random_bytes(40 * piece_bytes, seed);
    const Buffer buffer{*device, source.size()};
    const auto stream = device->make_stream(StreamPriority::demand);
    copy(*stream, {{buffer.data(), in_memory(source)}});
    EXPECT_EQ(read(buffer, 0, source.size()), source) << "seed " << seed;
  }
}

TEST_P(DeviceContract, copies_from_pinned_memory_arrive_whole_many_or_few_at_a_time) {
  const auto device = make({.copy_threads = 3});
  const Bytes source = random_bytes(50 * piece_bytes, 23);
  const PinnedBuffer pinned{*device, source.size()};
  std::ranges::copy(source, pinned.data());
  const Buffer buffer{*device, source.size()};
  Ops ops;
  std::vector<CopyBatch> batches;
  std::mt19937 random{23};
  for (std::uint64_t start = 0; start < source.size();) {
    const std::uint64_t most = random() % 3 == 0 ? 4 * piece_bytes : 300;
    const auto bytes = std::min<std::uint64_t>(1 + random() % most, source.size() - start);
    ops.push_back({buffer.data() + start, {pinned.data(), -1, start, bytes}});
    start += bytes;
  }
  for (std::size_t first = 0; first < ops.size();) {
    const auto count = std::min<std::size_t>(1 + random() % 4, ops.size() - first);
    batches.push_back({std::span{ops}.subspan(first, count)});
    first += count;
  }
  const auto stream = device->make_stream(StreamPriority::demand);
  static_cast<void>(stream->submit(batches));
  for (const auto& [fence, end] : ends_of(*stream, batches.size())) {
    EXPECT_EQ(end.what, What::landed) << fence << ": " << end.error;
  }
  EXPECT_EQ(device->link_stats().bytes, source.size());
  EXPECT_EQ(read(buffer, 0, source.size()), source);
}

TEST_P(DeviceContract, device_memory_is_read_back_once_its_mark_has_passed) {
  const auto device = make();
  const Bytes source = random_bytes(1000, 24);
  const Buffer buffer{*device, source.size()};
  const PinnedBuffer pinned{*device, source.size()};
  const auto stream = device->make_stream(StreamPriority::demand);
  copy(*stream, {{buffer.data(), in_memory(source)}});
  for (const std::size_t start : {0U, 500U}) {
    const HostWait how = start == 0 ? HostWait::spin : HostWait::sleep;
    device->wait(device->read_back(pinned.data(), buffer.data() + start, 500, 0, how));
    EXPECT_TRUE(
        std::ranges::equal(std::span{pinned.data(), 500}, std::span{source}.subspan(start, 500)));
  }
  const Mark mark = device->mark(0);
  device->wait(mark);
  device->wait(mark);
  device->wait(0);
  // Who has read is not waited for any longer.
  const CopyOp op{buffer.data(), in_memory(source)};
  const CopyBatch batch{{&op, 1}, mark};
  static_cast<void>(stream->submit({&batch, 1}));
  EXPECT_EQ(next_end(*stream).what, What::landed);
}

}  // namespace spmoe
