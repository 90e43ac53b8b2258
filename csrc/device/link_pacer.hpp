#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <random>
#include <thread>

#include "device/device.hpp"

namespace spmoe {

/// Makes a link slower than it is, and faulty, on request: each piece is given a stretch of link
/// time after the one before it, no earlier than its batch was submitted, and holds its thread
/// until that has passed. A thread that waits for a core loses no link time by that, as a copy
/// engine would not; one that waits for a disk is forgiven too. Guarded by the caller's lock,
/// except `hold`.
class LinkPacer {
 public:
  using Clock = std::chrono::steady_clock;

  /// Before every time that the clock shows, wherever its origin is.
  static constexpr Clock::time_point at_once = Clock::time_point::min();

  struct Ticket {
    Clock::time_point until = at_once;  ///< the piece may not end earlier
    bool fail = false;
  };

  LinkPacer(double gbps, const LinkFaults& faults) : gbps_{gbps} { inject(faults); }

  void inject(const LinkFaults& faults) {
    faults_ = faults;
    copies_ = 0;
    random_.seed(faults.delay_seed);
  }

  /// Whether pieces land later than the link lets them.
  [[nodiscard]] bool slows() const { return gbps_ > 0 || faults_.max_delay_us > 0; }

  /// Next in line for as much link time as `bytes` take, of a batch submitted at `submitted`. A
  /// random delay counts from `now` at the earliest.
  [[nodiscard]] Ticket admit(std::uint64_t bytes, Clock::time_point submitted,
                             Clock::time_point now) {
    Ticket ticket;
    ticket.fail = faults_.fail_at_copy != 0 && ++copies_ == faults_.fail_at_copy;
    if (!slows()) return ticket;
    if (gbps_ > 0) {
      const std::chrono::duration<double> length{static_cast<double>(bytes) / (gbps_ * 1e9)};
      free_ = std::max(free_, submitted) + std::chrono::duration_cast<Clock::duration>(length);
      ticket.until = free_;
    }
    if (faults_.max_delay_us > 0) {
      ticket.until = std::max(ticket.until, now);
      std::uniform_int_distribution<std::uint32_t> delay{0, faults_.max_delay_us};
      ticket.until += std::chrono::microseconds{delay(random_)};
    }
    return ticket;
  }

  /// Blocks until the ticket's link time has passed.
  static void hold(const Ticket& ticket) {
    if (ticket.until != at_once) std::this_thread::sleep_until(ticket.until);
  }

 private:
  double gbps_;
  LinkFaults faults_;
  std::uint64_t copies_ = 0;
  Clock::time_point free_ = at_once;
  std::minstd_rand random_;
};

}  // namespace spmoe
