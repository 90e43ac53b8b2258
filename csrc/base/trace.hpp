#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/types.hpp"

namespace spmoe {

/// The work of a span of time.
enum class Track : std::uint8_t { compute, wait, demand, prefetch };

/// Seconds of the monotonic clock; on Linux the one that Python's time.perf_counter reads.
[[nodiscard]] inline double to_seconds(std::chrono::steady_clock::time_point time) noexcept {
  return std::chrono::duration<double>(time.time_since_epoch()).count();
}
[[nodiscard]] inline double now_s() noexcept {
  return to_seconds(std::chrono::steady_clock::now());
}

/// One part of the work. A span that concerns a whole layer has expert 0xFFFF.
struct Span {
  static constexpr std::uint16_t whole_layer = 0xFFFF;
  Track track = Track::compute;
  ExpertId id{};
  double start_s = 0;
  double end_s = 0;
  std::uint32_t queue_depth = 0;  ///< fills that waited for the link when the span ended
};

/// The latest spans, in one block of memory; one of capacity 0 records nothing. One thread.
class TraceRing {
 public:
  explicit TraceRing(std::size_t capacity) : spans_(capacity) {}

  [[nodiscard]] bool enabled() const noexcept { return !spans_.empty(); }

  void push(const Span& span) noexcept {
    if (!enabled()) return;
    spans_[next_++ % spans_.size()] = span;
  }

  void clear() noexcept { next_ = 0; }

  /// The spans that are kept, oldest first.
  [[nodiscard]] std::vector<Span> spans() const {
    std::vector<Span> kept;
    const std::size_t count = next_ < spans_.size() ? next_ : spans_.size();
    kept.reserve(count);
    for (std::size_t i = next_ - count; i < next_; ++i) kept.push_back(spans_[i % spans_.size()]);
    return kept;
  }

 private:
  std::vector<Span> spans_;
  std::size_t next_ = 0;
};

}  // namespace spmoe
