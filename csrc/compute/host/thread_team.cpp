#include "compute/host/thread_team.hpp"

namespace spmoe {
namespace {

constexpr std::uint32_t stop = 0xFFFFFFFFU;
constexpr int spins = 4096;

/// Spins briefly, then sleeps, while `value` holds `idle`. Phases follow each other closely, and
/// waking a sleeper costs as much as a small phase.
void wait_while(const std::atomic<std::uint32_t>& value, std::uint32_t idle) noexcept {
  for (int spin = 0; spin < spins; ++spin) {
    if (value.load(std::memory_order_relaxed) != idle) return;
  }
  value.wait(idle, std::memory_order_relaxed);
}

}  // namespace

// Delegates, so that a thread that cannot start makes the destructor join those that did.
ThreadTeam::ThreadTeam(unsigned thread_count) : ThreadTeam{} {
  threads_.reserve(thread_count - 1);
  for (unsigned thread = 1; thread < thread_count; ++thread) {
    threads_.emplace_back([this, thread] { serve(thread); });
  }
}

ThreadTeam::~ThreadTeam() {
  unclaimed_.store(stop, std::memory_order_release);
  unclaimed_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadTeam::run(std::uint32_t count, Call call, const void* context) noexcept {
  if (count == 0) return;
  call_ = call;
  context_ = context;
  unfinished_.store(count, std::memory_order_relaxed);
  unclaimed_.store(count, std::memory_order_release);
  if (count > 1) unclaimed_.notify_all();
  for (;;) {
    const std::uint32_t unclaimed = unclaimed_.load(std::memory_order_relaxed);
    if (unclaimed == 0) break;
    run_one(unclaimed, 0);
  }
  for (;;) {
    const std::uint32_t unfinished = unfinished_.load(std::memory_order_acquire);
    if (unfinished == 0) return;
    wait_while(unfinished_, unfinished);
  }
}

void ThreadTeam::run_one(std::uint32_t unclaimed, unsigned thread) noexcept {
  if (!unclaimed_.compare_exchange_weak(unclaimed, unclaimed - 1, std::memory_order_acquire,
                                        std::memory_order_relaxed)) {
    return;
  }
  call_(context_, unclaimed - 1, thread);
  if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_one();
}

void ThreadTeam::serve(unsigned thread) noexcept {
  for (;;) {
    const std::uint32_t unclaimed = unclaimed_.load(std::memory_order_relaxed);
    if (unclaimed == stop) return;
    if (unclaimed == 0) {
      wait_while(unclaimed_, 0);
    } else {
      run_one(unclaimed, thread);
    }
  }
}

}  // namespace spmoe
