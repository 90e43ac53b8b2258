#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/types.hpp"

namespace spmoe {

/// Why a fill is made: compute waits for it, or a prediction asked for it.
enum class FillKind : std::uint8_t { prefetch, demand };

/// Experts that wait for a slot and the link, each at most once: demands in order of arrival,
/// then prefetches by their order and, of the same order, by arrival. Allocates at construction
/// only. One thread.
class TransferQueue {
 public:
  /// Room for `capacity` distinct experts, all that the model has.
  explicit TransferQueue(std::size_t capacity);

  [[nodiscard]] std::size_t size() const noexcept { return waiting_.size(); }

  struct Entry {
    ExpertId expert;
    FillKind kind;
    double order = 0;  ///< of a prefetch: lower is served earlier
  };

  /// Adds an expert. One that waits already keeps its place, unless it becomes a demand or its
  /// order changes.
  void push(ExpertId expert, FillKind kind, double order = 0);

  /// The i-th entry to serve; `i < size()`.
  [[nodiscard]] const Entry& operator[](std::size_t i) const { return waiting_[i]; }

  void erase(std::size_t i) { waiting_.erase(waiting_.begin() + static_cast<std::ptrdiff_t>(i)); }

  /// Cancels an expert, whatever it waits for. Returns whether it was waiting.
  bool cancel(ExpertId expert);

  /// Cancels an expert that waits as `kind`. Returns whether it did.
  bool cancel(ExpertId expert, FillKind kind);

  /// Cancels the entries of `kind` for experts of `layer`. Returns how many.
  std::size_t cancel_layer(std::uint16_t layer, FillKind kind);

  /// Cancels every entry of `kind`. Returns how many.
  std::size_t cancel_all(FillKind kind);

 private:
  std::vector<Entry> waiting_;  // in the order of service; small, so plain shifts win
};

}  // namespace spmoe
