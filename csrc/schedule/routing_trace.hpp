#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "base/types.hpp"

namespace spmoe {

/// Which experts a run needed, layer by layer, and how far a replay of it has come. One thread.
class RoutingTrace {
 public:
  static constexpr std::size_t never = std::numeric_limits<std::size_t>::max();

  RoutingTrace(std::uint16_t layer_count, std::uint16_t expert_count);

  [[nodiscard]] std::uint16_t layer_count() const noexcept { return layer_count_; }
  [[nodiscard]] std::uint16_t expert_count() const noexcept { return expert_count_; }

  /// Appends one access: distinct experts of `layer`, in the order of the run.
  /// @throws InvalidArgument if the model has no such expert; the trace is unchanged.
  void append(std::uint16_t layer, std::span<const std::uint16_t> experts);

  /// The replay's next access begins: it should be the next of the trace.
  /// Returns whether it is; if not, the replay has left the trace and nothing more is known.
  bool advance(std::uint16_t layer, std::span<const std::uint16_t> experts);

  void rewind() noexcept;  ///< back to the start

  /// Accesses to come, the running one not counted.
  [[nodiscard]] std::size_t remaining() const noexcept { return needs_.size() - next_; }

  /// The i-th access to come.
  struct Access {
    std::uint16_t layer;
    std::span<const std::uint16_t> experts;
  };
  [[nodiscard]] Access upcoming(std::size_t i) const;

  /// Accesses from now until the expert's next use, 0 being the next one; `never` if there is none.
  [[nodiscard]] std::size_t next_use(ExpertId expert) const;

 private:
  struct Entry {
    std::uint16_t layer;
    std::size_t begin;
    std::size_t end;
  };
  [[nodiscard]] std::size_t place(ExpertId expert) const {
    return std::size_t{expert.layer} * expert_count_ + expert.expert;
  }

  std::uint16_t layer_count_;
  std::uint16_t expert_count_;
  std::vector<Entry> needs_;
  std::vector<std::uint16_t> experts_;          // of all accesses, one behind the other
  std::vector<std::vector<std::size_t>> uses_;  // [layer, expert]: indices of accesses, ascending
  std::vector<std::size_t> passed_;             // [layer, expert]: uses before `next_`
  std::size_t next_ = 0;
};

}  // namespace spmoe
