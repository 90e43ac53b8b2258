#include "schedule/routing_trace.hpp"

#include <algorithm>
#include <string>

#include "base/error.hpp"

namespace spmoe {

RoutingTrace::RoutingTrace(std::uint16_t layer_count, std::uint16_t expert_count)
    : layer_count_{layer_count},
      expert_count_{expert_count},
      uses_(std::size_t{layer_count} * expert_count),
      passed_(uses_.size(), 0) {}

void RoutingTrace::append(std::uint16_t layer, std::span<const std::uint16_t> experts) {
  const auto inside = [&](std::uint16_t expert) {
    return layer < layer_count_ && expert < expert_count_;
  };
  const auto outside = std::ranges::find_if_not(experts, inside);
  if (outside != experts.end()) {
    throw InvalidArgument{"the trace names expert " + std::to_string(*outside) + " of layer " +
                          std::to_string(layer) + ", but there are " +
                          std::to_string(layer_count_) + " layers of " +
                          std::to_string(expert_count_) + " experts"};
  }
  const std::size_t begin = experts_.size();
  experts_.insert(experts_.end(), experts.begin(), experts.end());
  for (const std::uint16_t expert : experts) uses_[place({layer, expert})].push_back(needs_.size());
  needs_.push_back({layer, begin, experts_.size()});
}

bool RoutingTrace::advance(std::uint16_t layer, std::span<const std::uint16_t> experts) {
  if (next_ < needs_.size()) {
    const Access access = upcoming(0);
    if (access.layer == layer && std::ranges::equal(access.experts, experts)) {
      for (const std::uint16_t expert : experts) ++passed_[place({layer, expert})];
      ++next_;
      return true;
    }
  }
  next_ = needs_.size();
  return false;
}

void RoutingTrace::rewind() noexcept {
  next_ = 0;
  std::ranges::fill(passed_, std::size_t{0});
}

RoutingTrace::Access RoutingTrace::upcoming(std::size_t i) const {
  const Entry& entry = needs_.at(next_ + i);
  return {entry.layer, std::span{experts_}.subspan(entry.begin, entry.end - entry.begin)};
}

std::size_t RoutingTrace::next_use(ExpertId expert) const {
  const std::vector<std::size_t>& uses = uses_[place(expert)];
  const std::size_t passed = passed_[place(expert)];
  if (next_ == needs_.size() || passed == uses.size()) return never;
  return uses[passed] - next_;
}

}  // namespace spmoe
