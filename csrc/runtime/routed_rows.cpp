#include "runtime/routed_rows.hpp"

#include <algorithm>
#include <string>
#include <utility>

#include "base/error.hpp"

namespace spmoe {

RoutedRows::RoutedRows(std::uint16_t expert_count) : begin_(expert_count + 1U, 0) {
  experts_.reserve(expert_count);
  counts_.reserve(expert_count);
}

void RoutedRows::assign(std::span<const std::int64_t> top_k_index, std::uint32_t k) {
  const auto expert_count = begin_.size() - 1;
  std::ranges::fill(begin_, 0U);
  for (std::size_t i = 0; i < top_k_index.size(); ++i) {
    const std::int64_t expert = top_k_index[i];
    if (expert < 0 || std::cmp_greater_equal(expert, expert_count)) {
      throw InvalidArgument{"top_k_index[" + std::to_string(i / k) + ", " + std::to_string(i % k) +
                            "] is " + std::to_string(expert) + ", but the layer has experts 0 to " +
                            std::to_string(expert_count - 1)};
    }
    ++begin_[static_cast<std::size_t>(expert)];
  }
  experts_.clear();
  counts_.clear();
  std::uint32_t end = 0;
  for (std::size_t expert = 0; expert < expert_count; ++expert) {
    if (begin_[expert] > 0) {
      experts_.push_back(static_cast<std::uint16_t>(expert));
      counts_.push_back(begin_[expert]);
    }
    end += begin_[expert];
    begin_[expert] = end;
  }
  begin_[expert_count] = end;
  token_rows_.resize(top_k_index.size());
  out_rows_.resize(top_k_index.size());
  // Backwards, so that each expert's rows end up in the order of tokens.
  for (std::size_t i = top_k_index.size(); i-- > 0;) {
    const std::uint32_t place = --begin_[static_cast<std::size_t>(top_k_index[i])];
    token_rows_[place] = static_cast<std::uint32_t>(i / k);
    out_rows_[place] = static_cast<std::uint32_t>(i);
  }
}

ExpertTask RoutedRows::task(std::uint16_t expert, const std::byte* blob) const {
  const std::size_t first = begin_[expert];
  const std::size_t count = begin_[expert + 1U] - first;
  return {blob, std::span{token_rows_}.subspan(first, count),
          std::span{out_rows_}.subspan(first, count)};
}

}  // namespace spmoe
