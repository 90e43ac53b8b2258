#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "schedule/policies.hpp"

namespace spmoe {

template <class Rows>
std::vector<std::string> names_of(const Rows& rows) {
  std::vector<std::string> names;
  for (const auto& row : rows) names.emplace_back(row.name);
  return names;
}

inline std::vector<std::string> prefetch_policy_names() { return names_of(prefetch_policies()); }
inline std::vector<std::string> eviction_policy_names() { return names_of(eviction_policies()); }

/// A policy's name as gtest takes it.
inline std::string test_name(std::string policy) {
  std::ranges::replace(policy, '-', '_');
  return policy;
}

}  // namespace spmoe
