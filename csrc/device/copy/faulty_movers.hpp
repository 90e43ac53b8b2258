#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <random>

#include "device/copy/held_movers.hpp"

namespace spmoe {

/// Faults of a link. All zero: none.
struct LinkFaults {
  std::uint64_t fail_at_chunk = 0;  ///< the n-th chunk from now on fails, once; 0: none
  std::uint32_t delay_seed = 0;     ///< with `max_delay_us`: chunks wait a seeded random time
  std::uint32_t max_delay_us = 0;
};

/// The faults that a test plants in the links it gives this plan to. Thread-safe.
class FaultPlan {
 public:
  explicit FaultPlan(const LinkFaults& faults = {}) { plant(faults); }

  /// Replaces the planted faults and restarts their count.
  void plant(const LinkFaults& faults) {
    const std::scoped_lock lock{mutex_};
    faults_ = faults;
    chunks_ = 0;
    random_.seed(faults.delay_seed);
  }

  /// The ticket of the next chunk. A random delay counts from `now`.
  [[nodiscard]] HeldMovers::Ticket admit(HeldMovers::Clock::time_point now) {
    const std::scoped_lock lock{mutex_};
    HeldMovers::Ticket ticket;
    ticket.fail = faults_.fail_at_chunk != 0 && ++chunks_ == faults_.fail_at_chunk;
    if (faults_.max_delay_us > 0) {
      std::uniform_int_distribution<std::uint32_t> delay{0, faults_.max_delay_us};
      ticket.until = now + std::chrono::microseconds{delay(random_)};
    }
    return ticket;
  }

 private:
  std::mutex mutex_;
  LinkFaults faults_;
  std::uint64_t chunks_ = 0;
  std::minstd_rand random_;
};

/// An adaptor for tests: chunks that fail or are late as a plan says.
class FaultyMovers final : public HeldMovers {
 public:
  FaultyMovers(std::unique_ptr<ChunkMovers> upstream, std::shared_ptr<FaultPlan> plan)
      : HeldMovers{std::move(upstream)}, plan_{std::move(plan)} {}

  Ticket admit(std::uint64_t, Clock::time_point, Clock::time_point now) override {
    return plan_->admit(now);
  }

 private:
  const std::shared_ptr<FaultPlan> plan_;
};

}  // namespace spmoe
