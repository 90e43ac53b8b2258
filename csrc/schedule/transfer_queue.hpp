#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/types.hpp"

namespace spmoe {

/// Why a fill is made: compute waits for it, or a prediction asked for it.
enum class FillKind : std::uint8_t { prefetch, demand };

/// Experts that wait for a slot and the link, each at most once: demands in order of arrival,
/// then prefetches in order of arrival. Allocates at construction only. One thread.
class TransferQueue {
 public:
  /// Room for `capacity` distinct experts, all that the model has.
  explicit TransferQueue(std::size_t capacity);

  [[nodiscard]] bool empty() const noexcept { return waiting_.empty(); }
  [[nodiscard]] std::size_t size() const noexcept { return waiting_.size(); }

  struct Entry {
    ExpertId expert;
    FillKind kind;
  };

  /// Adds an expert. One that waits already keeps its place, or moves up to the demands.
  void push(ExpertId expert, FillKind kind);

  /// The entry to serve next; the queue is not empty.
  [[nodiscard]] const Entry& front() const { return waiting_.front(); }
  void pop_front() { waiting_.erase(waiting_.begin()); }

  /// Withdraws an expert. Returns whether it was waiting.
  bool cancel(ExpertId expert);

  /// Withdraws the entries of `kind` for experts of `layer`. Returns how many.
  std::size_t cancel_layer(std::uint16_t layer, FillKind kind);

 private:
  std::vector<Entry> waiting_;  // in the order of service; small, so plain shifts win
};

}  // namespace spmoe
