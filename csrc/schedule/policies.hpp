#pragma once

#include <memory>
#include <string>
#include <vector>

#include "schedule/eviction_policy.hpp"
#include "schedule/prefetch_policy.hpp"

namespace spmoe {

/// Which policies a scheduler uses. Any eviction goes with any prefetch.
struct PolicyNames {
  std::string prefetch = "on-demand";
  std::string eviction = "auto";  ///< the one that the prefetch policy's source uses
};

[[nodiscard]] std::vector<std::string> prefetch_policy_names();
[[nodiscard]] std::vector<std::string> eviction_policy_names();

/// @throws InvalidArgument if there is no policy of that name, listing those there are.
std::unique_ptr<PrefetchPolicy> make_prefetch_policy(const PolicyNames& names,
                                                     const PolicyView& view,
                                                     const PrefetchLimits& limits);
std::unique_ptr<EvictionPolicy> make_eviction_policy(const PolicyNames& names,
                                                     const PolicyView& view);

}  // namespace spmoe
