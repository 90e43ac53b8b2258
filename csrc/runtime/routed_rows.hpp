#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "compute/expert_ffn.hpp"

namespace spmoe {

/// The rows of one forward call, grouped by expert. Row t of the input and choice k of its router
/// make output row t * K + k. One thread; keeps its memory between calls.
class RoutedRows {
 public:
  explicit RoutedRows(std::uint16_t expert_count);

  /// Groups `top_k_index` [tokens, k].
  /// @throws InvalidArgument if an index is outside [0, expert_count), naming the position.
  void assign(std::span<const std::int64_t> top_k_index, std::uint32_t k);

  /// Experts with at least one row, ascending.
  [[nodiscard]] std::span<const std::uint16_t> experts() const noexcept { return experts_; }

  /// How many rows each of `experts` has.
  [[nodiscard]] std::span<const std::uint32_t> counts() const noexcept { return counts_; }

  /// The rows of `expert` as a task over `blob`.
  [[nodiscard]] ExpertTask task(std::uint16_t expert, const std::byte* blob) const;

 private:
  std::vector<std::uint32_t> begin_;  // [expert_count + 1]: where an expert's rows begin
  std::vector<std::uint32_t> token_rows_;
  std::vector<std::uint32_t> out_rows_;
  std::vector<std::uint16_t> experts_;
  std::vector<std::uint32_t> counts_;  // by place in `experts_`
};

}  // namespace spmoe
