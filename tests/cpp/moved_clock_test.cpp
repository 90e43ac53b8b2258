// The steady clock with another origin: SPMOE_TEST_CLOCK_S=0 makes it begin at 0, as on a machine
// that has just started, whatever the uptime. CTest runs these tests once more at several origins.

#include <gtest/gtest.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <ctime>
#include <optional>
#include <string>

namespace spmoe {
namespace {

constexpr long ns_per_s = 1'000'000'000;

std::optional<long> first_second() {
  const char* text = std::getenv("SPMOE_TEST_CLOCK_S");
  return text == nullptr ? std::nullopt : std::optional{std::stol(text)};
}

timespec read_system_clock(clockid_t clock) {
  timespec now{};
  if (::syscall(SYS_clock_gettime, clock, &now) != 0) std::abort();
  return now;
}

timespec read_moved_clock() {
  static const timespec boot = read_system_clock(CLOCK_MONOTONIC);
  static const long first = *first_second();
  timespec now = read_system_clock(CLOCK_MONOTONIC);
  now.tv_sec += first - boot.tv_sec;
  now.tv_nsec -= boot.tv_nsec;
  if (now.tv_nsec < 0) {
    now.tv_sec -= 1;
    now.tv_nsec += ns_per_s;
  }
  return now;
}

TEST(SteadyClock, begins_where_the_run_says) {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  if (const auto first = first_second()) {
    EXPECT_GE(now, std::chrono::seconds{*first});
    EXPECT_LT(now, std::chrono::seconds{*first} + std::chrono::hours{1});
  } else {
    const timespec later = read_system_clock(CLOCK_MONOTONIC);
    EXPECT_LE(now, std::chrono::seconds{later.tv_sec} + std::chrono::nanoseconds{later.tv_nsec});
  }
}

}  // namespace
}  // namespace spmoe

// In place of the C library's, for the C++ library too: an executable's symbols come first. No
// code here waits until a point of this clock, which the kernel would count from its own origin.
extern "C" __attribute__((visibility("default"))) int clock_gettime(clockid_t clock,
                                                                    timespec* now) noexcept {
  static const bool moved = spmoe::first_second().has_value();
  if (clock != CLOCK_MONOTONIC || !moved) {
    return static_cast<int>(::syscall(SYS_clock_gettime, clock, now));
  }
  *now = spmoe::read_moved_clock();
  return 0;
}
