#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

namespace spmoe {

/// A fixed set of threads that share the items of one phase after another. The caller is one of
/// them. Idle threads sleep: they spin for some microseconds at most.
/// One thread calls; destroyed by it, which joins the others.
class ThreadTeam {
 public:
  /// `thread_count` at least 1, the caller included.
  explicit ThreadTeam(unsigned thread_count);
  ~ThreadTeam();
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  [[nodiscard]] unsigned size() const noexcept {
    return static_cast<unsigned>(threads_.size()) + 1;
  }

  /// Calls `body(item, thread)` once for every item in [0, count), each on whichever thread is
  /// free, `thread` in [0, size()); blocks until all have returned. Earlier writes of
  /// the caller are visible to them, and their writes to the caller after. Allocates nothing.
  /// `body` must not throw or call `run`.
  template <class Body>
  void run(std::uint32_t count, const Body& body) noexcept {
    run(
        count,
        [](const void* context, std::uint32_t item, unsigned thread) noexcept {
          (*static_cast<const Body*>(context))(item, thread);
        },
        &body);
  }

 private:
  using Call = void (*)(const void* context, std::uint32_t item, unsigned thread) noexcept;

  ThreadTeam() = default;
  void run(std::uint32_t count, Call call, const void* context) noexcept;
  void run_one(std::uint32_t unclaimed, unsigned thread) noexcept;
  void serve(unsigned thread) noexcept;

  // A thread owns item n - 1 once it lowered `unclaimed_` from n, and only an owner reads the
  // phase: hence a late thread can neither delay nor misread the next one.
  Call call_ = nullptr;
  const void* context_ = nullptr;
  alignas(64) std::atomic<std::uint32_t> unclaimed_{0};
  alignas(64) std::atomic<std::uint32_t> unfinished_{0};
  std::vector<std::thread> threads_;
};

}  // namespace spmoe
