#include "device/host_device.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <fstream>
#include <string>
#include <vector>

#include "device/link_pacer.hpp"
#include "device_contract.hpp"

namespace spmoe {
namespace {

using namespace std::chrono_literals;

INSTANTIATE_TEST_SUITE_P(all, DeviceContract,
                         ::testing::Values(DeviceCase{"host", [] { return nullptr; },
                                                      make_host_device, read_host, true}),
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
  const auto message = [](const DeviceOptions& options) {
    return message_of<InvalidArgument>([&] { static_cast<void>(make_host_device(options)); });
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

TEST(HostDevice, faults_can_be_planted_later_and_count_from_then) {
  const auto device = make_host_device({.copy_threads = 1, .faults = {.fail_at_copy = 3}});
  const Bytes source = random_bytes(100, 15);
  const Buffer buffer{*device, 100};
  const auto stream = device->make_stream(StreamPriority::demand);
  const auto lands = [&] {
    return copy(*stream, {{buffer.data(), in_memory(source)}}).what == What::landed;
  };
  EXPECT_TRUE(lands());
  EXPECT_TRUE(lands());
  device->inject({.fail_at_copy = 2});
  EXPECT_TRUE(lands());
  EXPECT_FALSE(lands());
  EXPECT_TRUE(lands());
  device->inject({.fail_at_copy = 1});
  EXPECT_FALSE(lands());
  device->inject({});
  EXPECT_TRUE(lands());
}

// Every case of the pacer at clocks of different origins: a steady clock may begin anywhere.
class LinkPacerFrom
    : public ::testing::TestWithParam<std::pair<const char*, LinkPacer::Clock::time_point>> {
 protected:
  const LinkPacer::Clock::time_point start = GetParam().second;
};

INSTANTIATE_TEST_SUITE_P(
    origin, LinkPacerFrom,
    ::testing::Values(std::pair{"an_hour_before_zero", LinkPacer::Clock::time_point{-1h}},
                      std::pair{"zero", LinkPacer::Clock::time_point{}},
                      std::pair{"an_hour_after_zero", LinkPacer::Clock::time_point{1h}},
                      std::pair{"near_the_end", LinkPacer::Clock::time_point::max() - 24h}),
    [](const auto& test) { return test.param.first; });

TEST_P(LinkPacerFrom, lays_the_pieces_behind_each_other_on_the_link) {
  LinkPacer pacer{1.0, {}};
  EXPECT_EQ(pacer.admit(1'000'000'000, start, start).until, start + 1s);
  EXPECT_EQ(pacer.admit(500'000'000, start, start).until, start + 1500ms);
  EXPECT_EQ(pacer.admit(2'000'000'000, start + 1s, start + 1s).until, start + 3500ms);
}

TEST_P(LinkPacerFrom, a_link_that_was_free_begins_when_the_piece_was_submitted) {
  LinkPacer pacer{1.0, {}};
  const auto now = start + 1h;  // a thread gets to it an hour late
  EXPECT_EQ(pacer.admit(1'000'000'000, start, now).until, start + 1s);
  EXPECT_EQ(pacer.admit(1'000'000'000, start + 10s, now).until, start + 11s);
}

TEST_P(LinkPacerFrom, holds_nobody_when_the_link_is_not_paced) {
  LinkPacer pacer{0, {}};
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(pacer.admit(std::uint64_t{1} << 40, start, start).until, LinkPacer::at_once);
  }
}

TEST_P(LinkPacerFrom, delays_count_from_now_on_a_link_that_is_not_paced) {
  LinkPacer pacer{0, {.delay_seed = 1, .max_delay_us = 1000}};
  const auto until = pacer.admit(1, start, start + 1h).until;
  EXPECT_GE(until, start + 1h);
  EXPECT_LE(until, start + 1h + 1ms);
}

TEST_P(LinkPacerFrom, delays_are_the_same_for_the_same_seed) {
  const auto delays = [this](std::uint32_t seed) {
    LinkPacer pacer{1.0, {.delay_seed = seed, .max_delay_us = 1000}};
    std::vector<LinkPacer::Clock::duration> result;
    for (int i = 0; i < 20; ++i) result.push_back(pacer.admit(1000, start, start).until - start);
    return result;
  };
  EXPECT_EQ(delays(1), delays(1));
  EXPECT_NE(delays(1), delays(2));
}

TEST(LinkPacer, fails_the_nth_piece_once) {
  LinkPacer pacer{0, {.fail_at_copy = 2}};
  const auto fails = [&] { return pacer.admit(1, {}, {}).fail; };
  EXPECT_FALSE(fails());
  EXPECT_TRUE(fails());
  EXPECT_FALSE(fails());
  pacer.inject({.fail_at_copy = 1});
  EXPECT_TRUE(fails());
  EXPECT_FALSE(fails());
}

}  // namespace
}  // namespace spmoe
