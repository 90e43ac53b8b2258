#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/error.hpp"
#include "device/buffer.hpp"
#include "device/copy/copy_engine.hpp"
#include "device/copy/faulty_movers.hpp"
#include "device/device.hpp"
#include "message_of.hpp"
#include "temp_file.hpp"

namespace spmoe {

using Bytes = std::vector<std::byte>;
using Extents = std::vector<Extent>;
using Outcome = Completion::Outcome;

constexpr std::uint64_t chunk_bytes = 4096;

inline Bytes random_bytes(std::size_t count, std::uint32_t seed) {
  std::mt19937 random{seed};
  Bytes bytes(count);
  std::ranges::generate(bytes, [&] { return static_cast<std::byte>(random()); });
  return bytes;
}

inline Extent in_memory(const Bytes& bytes) { return {bytes.data(), -1, 0, bytes.size()}; }

/// `count` bytes of `bytes` from `first` on.
inline Bytes part(const Bytes& bytes, std::size_t first, std::size_t count) {
  const auto start = bytes.begin() + static_cast<std::ptrdiff_t>(first);
  return {start, start + static_cast<std::ptrdiff_t>(count)};
}

/// A copy engine over a device, whose completions wait here for the test. One test thread.
class Link {
 public:
  explicit Link(Device& device, CopyOptions options = {}) {
    options.chunk_bytes = chunk_bytes;
    engine_ = std::make_unique<CopyEngine>(make_movers(device, options), slot_count, options,
                                           [this](const Completion& completion) {
                                             const std::scoped_lock lock{mutex_};
                                             completions_.push_back(completion);
                                             arrived_.notify_all();
                                           });
  }

  /// A copy to submit, whose extents are kept for as long as it needs them.
  [[nodiscard]] SlotCopy copy_of(SlotIndex slot, std::byte* dst, Extents extents,
                                 CopyPriority priority = CopyPriority::demand) {
    return {slot, priority, dst, kept_.emplace_back(std::move(extents)), 0};
  }
  void submit(SlotIndex slot, std::byte* dst, Extents extents,
              CopyPriority priority = CopyPriority::demand) {
    const SlotCopy copy = copy_of(slot, dst, std::move(extents), priority);
    engine_->submit({&copy, 1});
  }

  /// Cancels the copy of `slot`. Returns its completion, at once or once chunks in flight ended.
  Completion cancel(SlotIndex slot) {
    if (auto ended = engine_->cancel(slot)) return *std::move(ended);
    return next_end();
  }

  /// The next completion that is not `issued`.
  Completion next_end() {
    std::unique_lock lock{mutex_};
    while (true) {
      arrived_.wait(lock, [this] { return !completions_.empty(); });
      Completion next = std::move(completions_.front());
      completions_.pop_front();
      if (next.outcome != Outcome::issued) return next;
    }
  }

  /// The ends of `count` copies, by slot.
  std::map<SlotIndex, Completion> ends(std::size_t count) {
    std::map<SlotIndex, Completion> ends;
    for (std::size_t i = 0; i < count; ++i) {
      Completion end = next_end();
      const SlotIndex slot = end.slot;
      EXPECT_TRUE(ends.emplace(slot, std::move(end)).second) << "ended twice";
    }
    return ends;
  }

  /// Copies over a link that is idle. Returns the end.
  Completion copy(std::byte* dst, Extents extents, CopyPriority priority = CopyPriority::demand) {
    submit(0, dst, std::move(extents), priority);
    return next_end();
  }

  /// Completions that the engine has reported and the test has not taken, `issued` included.
  [[nodiscard]] std::deque<Completion> untaken() {
    const std::scoped_lock lock{mutex_};
    return completions_;
  }

  [[nodiscard]] CopyEngine& engine() { return *engine_; }
  [[nodiscard]] LinkStats stats() const { return engine_->stats(); }

  static constexpr SlotIndex slot_count = 1000;

 private:
  std::deque<Extents> kept_;
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::deque<Completion> completions_;
  std::unique_ptr<CopyEngine> engine_;  // ends first
};

/// One implementation under the contract.
struct DeviceCase {
  const char* name;
  /// Makes what the device needs, for the length of a test.
  std::function<std::shared_ptr<void>()> begin;
  std::function<std::unique_ptr<Device>()> make;
  std::function<Bytes(const std::byte* device_memory, std::size_t bytes)> read;
};

inline Bytes read_host(const std::byte* memory, std::size_t bytes) {
  return {memory, memory + bytes};
}

// The contract of Device, ChunkMovers and CopyEngine: every device is run through every case below.
class DeviceContract : public ::testing::TestWithParam<DeviceCase> {
 protected:
  static std::unique_ptr<Device> make() { return GetParam().make(); }
  static Bytes read(const Buffer& buffer, std::size_t offset, std::size_t bytes) {
    return GetParam().read(buffer.data() + offset, bytes);
  }
  static std::shared_ptr<FaultPlan> planted(const LinkFaults& faults) {
    return std::make_shared<FaultPlan>(faults);
  }

 private:
  std::shared_ptr<void> session_ = GetParam().begin();
};

/// A link so slow that a copy of many chunks stays in flight for the length of a test, unless it is
/// cancelled: a chunk a hundredth of a second.
constexpr double slow_gbps = 4e-4;
constexpr std::size_t many_chunks = 1000;

TEST_P(DeviceContract, memory_is_aligned_and_apart) {
  const auto device = make();
  const Buffer first{*device, 10'000};
  const Buffer second{*device, 10'000};
  for (const Buffer* buffer : {&first, &second}) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer->data()) % 256, 0u);
  }
  const Bytes ones = random_bytes(10'000, 1);
  const Bytes twos = random_bytes(10'000, 2);
  Link link{*device};
  link.submit(0, first.data(), {in_memory(ones)});
  link.submit(1, second.data(), {in_memory(twos)});
  link.ends(2);
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
  Link link{*device};
  for (const std::uint64_t bytes :
       {std::uint64_t{1}, chunk_bytes - 1, chunk_bytes, chunk_bytes + 1, 5 * chunk_bytes + 7}) {
    for (const bool from_file : {false, true}) {
      const Buffer buffer{*device, 40'000};
      const Extent where = from_file ? Extent{nullptr, file.descriptor(), 13, bytes}
                                     : Extent{source.data(), -1, 13, bytes};
      const Completion end = link.copy(buffer.data() + 100, {where}, CopyPriority::prefetch);
      EXPECT_EQ(end.outcome, Outcome::arrived);
      EXPECT_EQ(end.bytes_moved, bytes);
      EXPECT_EQ(read(buffer, 100, bytes), part(source, 13, bytes))
          << bytes << (from_file ? " file" : " memory");
      EXPECT_EQ(read(buffer, 99, 1)[0], std::byte{0}) << "written before the destination";
      EXPECT_EQ(read(buffer, 100 + bytes, 1)[0], std::byte{0}) << "written past the destination";
    }
  }
}

TEST_P(DeviceContract, extents_arrive_one_behind_the_other) {
  const auto device = make();
  const Bytes source = random_bytes(300'000, 4);
  const TempFile file{source};
  const Buffer buffer{*device, source.size()};
  Extents extents;
  std::mt19937 random{5};
  for (std::uint64_t start = 0; start < source.size();) {
    const auto bytes = std::min<std::uint64_t>(1 + random() % 3000, source.size() - start);
    extents.push_back(random() % 2 == 0 ? Extent{source.data(), -1, start, bytes}
                                        : Extent{nullptr, file.descriptor(), start, bytes});
    start += bytes;
  }
  std::ranges::shuffle(extents, random);
  Bytes wanted;
  for (const Extent& extent : extents) {
    const Bytes bytes = part(source, extent.offset, extent.bytes);
    wanted.insert(wanted.end(), bytes.begin(), bytes.end());
  }
  Link link{*device, {.copy_threads = 3}};
  EXPECT_EQ(link.copy(buffer.data(), extents).bytes_moved, source.size());
  EXPECT_EQ(read(buffer, 0, source.size()), wanted);
}

TEST_P(DeviceContract, every_copy_of_every_call_ends_once) {
  const auto device = make();
  constexpr SlotIndex count = 64;
  const Bytes source = random_bytes(count * chunk_bytes, 6);
  const Buffer buffer{*device, source.size()};
  Link link{*device, {.copy_threads = 3}};
  for (SlotIndex first = 0, calls = 1; first < count; first += calls, calls = 63 / 3) {
    std::vector<SlotCopy> copies;
    for (SlotIndex slot = first; slot < first + calls; ++slot) {
      const std::size_t at = slot * chunk_bytes;
      copies.push_back(
          link.copy_of(slot, buffer.data() + at, {{source.data(), -1, at, chunk_bytes}}));
    }
    link.engine().submit(copies);
  }
  link.engine().submit({});
  const auto ends = link.ends(count);
  EXPECT_EQ(ends.begin()->first, 0u);
  EXPECT_EQ(ends.rbegin()->first, count - 1);
  for (const auto& [slot, end] : ends) {
    EXPECT_EQ(end.outcome, Outcome::arrived);
    EXPECT_EQ(end.bytes_moved, chunk_bytes);
    EXPECT_EQ(end.error, "");
  }
  EXPECT_EQ(read(buffer, 0, source.size()), source);
}

TEST_P(DeviceContract, a_copy_has_arrived_when_its_end_is_reported_whatever_the_others_do) {
  const auto device = make();
  constexpr SlotIndex count = 30;
  const Bytes source = random_bytes(count * chunk_bytes, 7);
  const Buffer buffer{*device, source.size()};
  Link link{*device, {.copy_threads = 3}};
  std::vector<SlotCopy> copies;
  for (SlotIndex slot = 0; slot < count; ++slot) {
    const std::size_t at = slot * chunk_bytes;
    copies.push_back(
        link.copy_of(slot, buffer.data() + at, {{source.data(), -1, at, chunk_bytes}}));
  }
  link.engine().submit(copies);
  copies.clear();  // the span need not outlive the call
  for (SlotIndex i = 0; i < count; ++i) {
    const std::size_t at = link.next_end().slot * chunk_bytes;
    EXPECT_EQ(read(buffer, at, chunk_bytes), part(source, at, chunk_bytes));
  }
}

TEST_P(DeviceContract, extents_without_a_byte_change_nothing_and_a_copy_of_none_is_refused) {
  const auto device = make();
  const Bytes source = random_bytes(100, 7);
  const Buffer buffer{*device, 100};
  Link link{*device};
  const Extent none{source.data(), -1, 0, 0};
  const Extent first{source.data(), -1, 0, 40};
  const Extent second{source.data(), -1, 40, 60};
  EXPECT_EQ(link.copy(buffer.data(), {none, first, none, second, none}).bytes_moved, 100u);
  EXPECT_EQ(read(buffer, 0, 100), source);
  EXPECT_THROW(link.submit(0, buffer.data(), {none}), std::logic_error);
  EXPECT_THROW(link.submit(0, buffer.data(), {}), std::logic_error);
  EXPECT_EQ(link.copy(buffer.data(), {first}).outcome, Outcome::arrived);
}

TEST_P(DeviceContract, a_slot_gets_one_copy_at_a_time) {
  const auto device = make();
  const Bytes source = random_bytes(many_chunks * chunk_bytes, 8);
  const Buffer buffer{*device, source.size()};
  Link link{*device, {.link_gbps = slow_gbps}};
  link.submit(3, buffer.data(), {in_memory(source)}, CopyPriority::prefetch);
  EXPECT_THROW(link.submit(3, buffer.data(), {in_memory(source)}), std::logic_error);
  EXPECT_EQ(link.cancel(3).outcome, Outcome::cancelled);
  link.submit(3, buffer.data(), {{source.data(), -1, 0, 10}});
  EXPECT_EQ(link.next_end().outcome, Outcome::arrived);
}

TEST_P(DeviceContract, an_engine_that_goes_finishes_its_copies_and_reports_them) {
  const auto device = make();
  const Bytes source = random_bytes(50 * chunk_bytes, 9);
  const Buffer buffer{*device, source.size()};
  Link link{*device, {.copy_threads = 3}};
  for (SlotIndex slot = 0; slot < 50; ++slot) {
    const std::size_t at = slot * chunk_bytes;
    link.submit(slot, buffer.data() + at, {{source.data(), -1, at, chunk_bytes}},
                slot % 2 == 0 ? CopyPriority::prefetch : CopyPriority::demand);
  }
  link.engine().close();
  link.engine().close();
  EXPECT_EQ(read(buffer, 0, source.size()), source);
  EXPECT_EQ(link.stats().bytes, source.size());
  const auto untaken = link.untaken();
  EXPECT_EQ(std::ranges::count(untaken, Outcome::arrived, &Completion::outcome), 50);
}

TEST_P(DeviceContract, a_copy_is_issued_before_it_has_arrived_or_never) {
  const auto device = make();
  const PinnedBuffer source{*device, 20 * chunk_bytes};
  const Buffer buffer{*device, source.bytes()};
  Link link{*device, {.copy_threads = 3}};
  for (SlotIndex slot = 0; slot < 10; ++slot) {
    const std::size_t at = slot * 2 * chunk_bytes;
    link.submit(slot, buffer.data() + at, {{source.data(), -1, at, 2 * chunk_bytes}});
  }
  link.engine().close();
  std::map<SlotIndex, std::vector<Outcome>> outcomes;
  for (const Completion& completion : link.untaken()) {
    outcomes[completion.slot].push_back(completion.outcome);
  }
  EXPECT_EQ(outcomes.size(), 10u);
  for (const auto& [slot, order] : outcomes) {
    EXPECT_EQ(order.back(), Outcome::arrived);
    EXPECT_EQ(std::ranges::count(order, Outcome::issued), device->name() == "host" ? 0 : 1);
    EXPECT_EQ(std::ranges::count(order, Outcome::arrived), 1);
  }
}

TEST_P(DeviceContract, the_callback_may_submit_into_the_slot_that_has_just_ended) {
  const auto device = make();
  const Bytes source = random_bytes(chunk_bytes, 9);
  const Buffer buffer{*device, source.size()};
  const CopyOptions options{.copy_threads = 2, .chunk_bytes = chunk_bytes};
  const Extent extent = in_memory(source);
  const SlotCopy again{0, CopyPriority::demand, buffer.data(), {&extent, 1}, 0};
  CopyEngine* engine = nullptr;
  std::mutex mutex;
  std::condition_variable changed;
  int ended = 0;
  CopyEngine it{make_movers(*device, options), 1, options, [&](const Completion& completion) {
                  if (completion.outcome == Outcome::issued) return;
                  const std::scoped_lock lock{mutex};
                  if (++ended < 20) engine->submit({&again, 1});
                  changed.notify_all();
                }};
  engine = &it;
  it.submit({&again, 1});
  std::unique_lock lock{mutex};
  changed.wait(lock, [&] { return ended == 20; });
  EXPECT_EQ(it.stats().bytes, 20 * chunk_bytes);
}

TEST_P(DeviceContract, a_file_that_is_too_short_fails_its_own_copy_once) {
  const auto device = make();
  const Bytes source = random_bytes(2 * chunk_bytes, 10);
  const TempFile file{source};
  const Buffer buffer{*device, 8 * chunk_bytes};
  Link link{*device};
  const auto start = [&](SlotIndex slot, std::size_t to_chunk, std::uint64_t offset,
                         std::uint64_t bytes) {
    link.submit(slot, buffer.data() + to_chunk * chunk_bytes,
                {{nullptr, file.descriptor(), offset, bytes}});
  };
  start(0, 0, 0, chunk_bytes);
  start(1, 1, chunk_bytes, 2 * chunk_bytes);
  start(2, 3, 10, 2 * chunk_bytes - 10);
  auto ends = link.ends(3);
  EXPECT_EQ(ends.at(0).outcome, Outcome::arrived);
  EXPECT_EQ(ends.at(2).outcome, Outcome::arrived);
  EXPECT_EQ(ends.at(1).outcome, Outcome::failed);
  EXPECT_EQ(ends.at(1).bytes_moved, chunk_bytes);
  EXPECT_EQ(ends.at(1).error,
            "the file ends at byte 8192, 4096 bytes short: it was truncated after it was opened");
  start(1, 5, 0, 2 * chunk_bytes);
  const Completion next = link.next_end();
  EXPECT_EQ(next.outcome, Outcome::arrived);
  EXPECT_EQ(next.error, "");
  EXPECT_EQ(read(buffer, 5 * chunk_bytes, 2 * chunk_bytes), source);
}

TEST_P(DeviceContract, a_copy_with_several_faults_reports_one_of_them) {
  const auto device = make();
  const TempFile file{random_bytes(10, 11)};
  const Buffer buffer{*device, 8 * chunk_bytes};
  Link link{*device};
  const Completion bad =
      link.copy(buffer.data(), {{nullptr, file.descriptor(), 0, 8 * chunk_bytes}});
  EXPECT_EQ(bad.outcome, Outcome::failed);
  EXPECT_EQ(bad.bytes_moved, 0u);
  EXPECT_NE(bad.error, "");
}

TEST_P(DeviceContract, a_descriptor_that_cannot_be_read_fails_with_the_system_s_reason) {
  const auto device = make();
  const Buffer buffer{*device, 100};
  Link link{*device};
  EXPECT_EQ(link.copy(buffer.data(), {{nullptr, -1, 7, 100}}).error,
            "read of 100 bytes at offset 7 failed: Bad file descriptor");
}

TEST_P(DeviceContract, link_stats_count_the_bytes_that_arrived) {
  const auto device = make();
  const Bytes source = random_bytes(3 * chunk_bytes + 5, 12);
  const TempFile file{source};
  const Buffer buffer{*device, 2 * source.size()};
  Link link{*device};
  EXPECT_EQ(link.stats().bytes, 0u);
  link.copy(buffer.data(), {in_memory(source), {nullptr, file.descriptor(), 0, source.size()}});
  EXPECT_EQ(link.stats().bytes, 2 * source.size());
  EXPECT_GT(link.stats().busy_s, 0.0);
  const Completion bad = link.copy(buffer.data(), {{nullptr, file.descriptor(), source.size(), 9}});
  EXPECT_EQ(bad.outcome, Outcome::failed);
  EXPECT_EQ(link.stats().bytes, 2 * source.size());
}

TEST_P(DeviceContract, a_planted_fault_fails_one_copy_and_no_other) {
  const auto device = make();
  const Bytes source = random_bytes(chunk_bytes, 13);
  const Buffer buffer{*device, 5 * chunk_bytes};
  Link link{*device, {.copy_threads = 1, .faults = planted({.fail_at_chunk = 3})}};
  for (SlotIndex slot = 0; slot < 5; ++slot) {
    link.submit(slot, buffer.data() + slot * chunk_bytes, {in_memory(source)});
  }
  for (const auto& [slot, end] : link.ends(5)) {
    if (slot == 2) {
      EXPECT_EQ(end.outcome, Outcome::failed);
      EXPECT_EQ(end.error, "read error injected by a test");
    } else {
      EXPECT_EQ(end.outcome, Outcome::arrived);
      EXPECT_EQ(read(buffer, slot * chunk_bytes, chunk_bytes), source) << slot;
    }
  }
  EXPECT_EQ(link.stats().bytes, 4 * chunk_bytes);
}

TEST_P(DeviceContract, faults_can_be_planted_later_and_count_from_then) {
  const auto device = make();
  const auto faults = planted({.fail_at_chunk = 3});
  const Bytes source = random_bytes(100, 15);
  const Buffer buffer{*device, 100};
  Link link{*device, {.copy_threads = 1, .faults = faults}};
  const auto arrives = [&] {
    return link.copy(buffer.data(), {in_memory(source)}).outcome == Outcome::arrived;
  };
  EXPECT_TRUE(arrives());
  EXPECT_TRUE(arrives());
  faults->plant({.fail_at_chunk = 2});
  EXPECT_TRUE(arrives());
  EXPECT_FALSE(arrives());
  EXPECT_TRUE(arrives());
  faults->plant({.fail_at_chunk = 1});
  EXPECT_FALSE(arrives());
  faults->plant({});
  EXPECT_TRUE(arrives());
}

TEST_P(DeviceContract, a_demand_goes_ahead_of_the_prefetches_that_wait) {
  const auto device = make();
  const Bytes source = random_bytes(many_chunks * chunk_bytes, 14);
  const Buffer buffer{*device, source.size() + chunk_bytes};
  Link link{*device, {.copy_threads = 1, .link_gbps = slow_gbps}};
  link.submit(0, buffer.data(), {in_memory(source)}, CopyPriority::prefetch);
  link.submit(1, buffer.data() + source.size(), {{source.data(), -1, 0, chunk_bytes}});
  const Completion sooner = link.next_end();
  EXPECT_EQ(sooner.slot, 1u);
  EXPECT_EQ(sooner.outcome, Outcome::arrived);
  EXPECT_LE(link.stats().prefetch_before_demand, chunk_bytes);
  EXPECT_EQ(link.cancel(0).outcome, Outcome::cancelled);
}

TEST_P(DeviceContract, a_cancelled_copy_ends_with_the_chunks_that_had_begun) {
  const auto device = make();
  const Bytes source = random_bytes(many_chunks * chunk_bytes, 16);
  const Buffer buffer{*device, source.size()};
  Link link{*device, {.copy_threads = 2, .link_gbps = slow_gbps}};
  for (const CopyPriority priority : {CopyPriority::prefetch, CopyPriority::demand}) {
    const std::uint64_t before = link.stats().bytes;
    link.submit(0, buffer.data(), {in_memory(source)}, priority);
    const Completion end = link.cancel(0);
    EXPECT_EQ(end.slot, 0u);
    EXPECT_EQ(end.outcome, Outcome::cancelled);
    EXPECT_EQ(end.error, "");
    EXPECT_LT(end.bytes_moved, source.size());
    EXPECT_EQ(link.stats().bytes - before, end.bytes_moved);
    // Nothing is written any more: the destination may be another's at once.
    const Bytes other = random_bytes(chunk_bytes, 17);
    link.copy(buffer.data(), {in_memory(other)});
    EXPECT_EQ(read(buffer, 0, chunk_bytes), other);
    EXPECT_FALSE(link.engine().cancel(0).has_value());  // it has ended
    EXPECT_FALSE(link.engine().cancel(1).has_value());  // there never was one
    EXPECT_EQ(link.copy(buffer.data(), {in_memory(other)}).outcome, Outcome::arrived);
  }
}

TEST_P(DeviceContract, cancelling_one_copy_lets_the_others_arrive) {
  const auto device = make();
  const Bytes source = random_bytes(many_chunks * chunk_bytes, 18);
  const Buffer buffer{*device, source.size() + 2 * chunk_bytes};
  Link link{*device, {.copy_threads = 1, .link_gbps = slow_gbps}};
  const Extent small{source.data(), -1, 0, chunk_bytes};
  std::byte* behind = buffer.data() + source.size();
  const std::vector<SlotCopy> copies{
      link.copy_of(0, buffer.data(), {in_memory(source)}, CopyPriority::prefetch),
      link.copy_of(1, behind, {small}, CopyPriority::prefetch),
      link.copy_of(2, behind + chunk_bytes, {small}, CopyPriority::prefetch)};
  link.engine().submit(copies);
  const auto unbegun = link.engine().cancel(1);  // waits behind the first
  ASSERT_TRUE(unbegun.has_value());
  EXPECT_EQ(unbegun->slot, 1u);
  EXPECT_EQ(unbegun->outcome, Outcome::cancelled);
  EXPECT_EQ(unbegun->bytes_moved, 0u);
  EXPECT_EQ(link.cancel(0).slot, 0u);
  const Completion last = link.next_end();
  EXPECT_EQ(last.slot, 2u);
  EXPECT_EQ(last.outcome, Outcome::arrived);
  EXPECT_EQ(read(buffer, source.size() + chunk_bytes, chunk_bytes), part(source, 0, chunk_bytes));
  EXPECT_EQ(read(buffer, source.size(), chunk_bytes), Bytes(chunk_bytes));
}

TEST_P(DeviceContract, a_cancelled_copy_with_a_fault_has_failed) {
  const auto device = make();
  const Bytes source = random_bytes(many_chunks * chunk_bytes, 19);
  const Buffer buffer{*device, source.size()};
  Link link{*device,
            {.copy_threads = 1, .link_gbps = slow_gbps, .faults = planted({.fail_at_chunk = 1})}};
  link.submit(0, buffer.data(), {in_memory(source)}, CopyPriority::prefetch);
  // Once its second chunk has arrived, its first has failed.
  while (link.stats().bytes == 0) std::this_thread::yield();
  const Completion end = link.cancel(0);
  EXPECT_EQ(end.outcome, Outcome::failed);
  EXPECT_EQ(end.error, "read error injected by a test");
  EXPECT_LT(end.bytes_moved, source.size());
}

TEST_P(DeviceContract, cancelling_at_any_moment_accounts_for_every_byte) {
  std::mt19937 random{20};
  const auto device = make();
  const Bytes source = random_bytes(8 * chunk_bytes, 20);
  const Buffer buffer{*device, source.size()};
  Link link{*device,
            {.copy_threads = 3, .faults = planted({.delay_seed = 20, .max_delay_us = 50})}};
  std::uint64_t moved = 0;
  for (int round = 0; round < 200; ++round) {
    link.submit(0, buffer.data(), {in_memory(source)}, CopyPriority::prefetch);
    for (auto spin = random() % 2000; spin > 0; --spin) static_cast<void>(random());
    if (round % 3 == 0) link.engine().promote(0);
    const Completion end = link.cancel(0);
    EXPECT_EQ(end.slot, 0u);
    EXPECT_EQ(end.outcome == Outcome::arrived, end.bytes_moved == source.size());
    moved += end.bytes_moved;
    EXPECT_EQ(link.stats().bytes, moved);
    EXPECT_TRUE(link.untaken().empty()) << "ended twice";
  }
}

TEST_P(DeviceContract, a_promoted_copy_overtakes_the_prefetches_before_it) {
  const auto device = make();
  const Bytes source = random_bytes(many_chunks * chunk_bytes, 21);
  const Buffer buffer{*device, source.size() + 3 * chunk_bytes};
  Link link{*device, {.copy_threads = 2, .link_gbps = slow_gbps}};
  link.submit(0, buffer.data(), {in_memory(source)}, CopyPriority::prefetch);
  link.submit(1, buffer.data() + source.size(), {{source.data(), -1, 5, 3 * chunk_bytes}},
              CopyPriority::prefetch);
  link.engine().promote(1);
  link.engine().promote(9);  // there is none
  const Completion end = link.next_end();
  EXPECT_EQ(end.slot, 1u);
  EXPECT_EQ(end.outcome, Outcome::arrived);
  EXPECT_EQ(read(buffer, source.size(), 3 * chunk_bytes), part(source, 5, 3 * chunk_bytes));
  // Two threads at half a chunk each.
  EXPECT_LE(link.stats().prefetch_before_demand, chunk_bytes);
  link.engine().promote(1);  // it has ended
  EXPECT_EQ(link.cancel(0).outcome, Outcome::cancelled);
}

TEST_P(DeviceContract, a_promoted_copy_may_be_cancelled) {
  const auto device = make();
  const Bytes source = random_bytes(many_chunks * chunk_bytes, 22);
  const Buffer buffer{*device, source.size()};
  Link link{*device, {.copy_threads = 1, .link_gbps = slow_gbps}};
  link.submit(0, buffer.data(), {in_memory(source)}, CopyPriority::prefetch);
  link.engine().promote(0);
  link.engine().promote(0);
  EXPECT_EQ(link.cancel(0).outcome, Outcome::cancelled);
}

TEST_P(DeviceContract, random_delays_change_no_byte) {
  const auto device = make();
  for (const std::uint32_t seed : {1U, 2U, 3U}) {
    const Bytes source = random_bytes(40 * chunk_bytes, seed);
    const Buffer buffer{*device, source.size()};
    Link link{*device,
              {.copy_threads = 4, .faults = planted({.delay_seed = seed, .max_delay_us = 300})}};
    link.copy(buffer.data(), {in_memory(source)});
    EXPECT_EQ(read(buffer, 0, source.size()), source) << "seed " << seed;
  }
}

TEST_P(DeviceContract, copies_from_pinned_memory_arrive_whole_many_or_few_at_a_time) {
  const auto device = make();
  const Bytes source = random_bytes(50 * chunk_bytes, 23);
  const PinnedBuffer pinned{*device, source.size()};
  std::ranges::copy(source, pinned.data());
  const Buffer buffer{*device, source.size()};
  Link link{*device, {.copy_threads = 3}};
  std::vector<SlotCopy> copies;
  std::mt19937 random{23};
  for (std::uint64_t start = 0; start < source.size();) {
    const std::uint64_t first = start;
    Extents extents;
    for (auto count = 1 + random() % 4; count > 0 && start < source.size(); --count) {
      const std::uint64_t most = random() % 3 == 0 ? 4 * chunk_bytes : 300;
      const auto bytes = std::min<std::uint64_t>(1 + random() % most, source.size() - start);
      extents.push_back({pinned.data(), -1, start, bytes});
      start += bytes;
    }
    copies.push_back(link.copy_of(static_cast<SlotIndex>(copies.size()), buffer.data() + first,
                                  std::move(extents)));
  }
  link.engine().submit(copies);
  for (const auto& [slot, end] : link.ends(copies.size())) {
    EXPECT_EQ(end.outcome, Outcome::arrived) << slot << ": " << end.error;
  }
  EXPECT_EQ(link.stats().bytes, source.size());
  EXPECT_EQ(read(buffer, 0, source.size()), source);
}

TEST_P(DeviceContract, device_memory_is_read_back_once_its_event_has_passed) {
  const auto device = make();
  const Bytes source = random_bytes(1000, 24);
  const Buffer buffer{*device, source.size()};
  const PinnedBuffer pinned{*device, source.size()};
  Link link{*device};
  link.copy(buffer.data(), {in_memory(source)});
  for (const std::size_t start : {0U, 500U}) {
    const HostWait how = start == 0 ? HostWait::spin : HostWait::sleep;
    device->wait(device->read_back(pinned.data(), buffer.data() + start, 500, 0, how));
    EXPECT_TRUE(
        std::ranges::equal(std::span{pinned.data(), 500}, std::span{source}.subspan(start, 500)));
  }
  const EventId event = device->record_event(0);
  device->wait(event);
  device->wait(event);
  device->wait(0);
  // A copy behind an event that has passed does not wait for it any longer.
  SlotCopy copy = link.copy_of(0, buffer.data(), {in_memory(source)});
  copy.after = event;
  link.engine().submit({&copy, 1});
  EXPECT_EQ(link.next_end().outcome, Outcome::arrived);
}

TEST_P(DeviceContract, options_that_make_no_link_are_refused) {
  const auto device = make();
  const auto message = [&](const CopyOptions& options) {
    return message_of<InvalidArgument>([&] { static_cast<void>(make_movers(*device, options)); });
  };
  EXPECT_EQ(message({.copy_threads = 0}), "copy_threads is 0; give 1 to 1024");
  EXPECT_EQ(message({.copy_threads = 1025}), "copy_threads is 1025; give 1 to 1024");
  const std::string cure =
      "; give 0 for a link that is not paced, or at least 1e-06 (10^9 bytes a second)";
  EXPECT_EQ(message({.link_gbps = -1}), "link_gbps is -1" + cure);
  EXPECT_EQ(message({.link_gbps = 1e-300}), "link_gbps is 1e-300" + cure);
  EXPECT_EQ(message({.link_gbps = HUGE_VAL}), "link_gbps is inf" + cure);
  EXPECT_EQ(message({.link_gbps = std::nan("")}), "link_gbps is nan" + cure);
}

}  // namespace spmoe
