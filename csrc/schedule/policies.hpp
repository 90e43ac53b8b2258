#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "schedule/eviction/eviction_policy.hpp"
#include "schedule/prefetch/prefetch_policy.hpp"

namespace spmoe {

/// Which policies a scheduler uses. Any eviction goes with any prefetch.
struct PolicyNames {
  std::string prefetch = "on-demand";
  std::string eviction = "auto";  ///< the one that the prefetch policy's source uses
};

/// Models whose states a policy's predictions are made from.
struct PredictedFrom {
  bool draft = false;
  bool target = false;
};

/// Member of `PrefetchLimits` that says whether a prediction is of any use to a policy.
enum class LimitedBy : std::uint8_t { nothing, cutoff_layer, break_even };

/// A prefetch policy as it describes itself. Nothing outside its row goes by its name.
struct PrefetchEntry {
  std::string_view name;
  std::string_view eviction;  ///< that its source uses
  /// Where neither an eviction nor "auto" is asked for: the one of least traffic.
  std::string_view default_eviction = eviction;
  PredictedFrom reads = {};
  LimitedBy limited_by = LimitedBy::nothing;
  bool replays = false;  ///< has to be given the routing to come; see `Foresight::replay`
  std::unique_ptr<PrefetchPolicy> (*make)(const PolicyView&);
};

/// An eviction policy as it describes itself.
struct EvictionEntry {
  std::string_view name;
  bool replays = false;  ///< as `PrefetchEntry::replays`
  std::unique_ptr<EvictionPolicy> (*make)(const PolicyView&);
};

/// Every policy, in the order of the documents.
[[nodiscard]] std::span<const PrefetchEntry> prefetch_policies() noexcept;
[[nodiscard]] std::span<const EvictionEntry> eviction_policies() noexcept;

/// The row that `names` asks for.
/// @throws InvalidArgument if there is no policy of that name, listing those there are.
[[nodiscard]] const PrefetchEntry& prefetch_policy(const PolicyNames& names);
[[nodiscard]] const EvictionEntry& eviction_policy(const PolicyNames& names);

}  // namespace spmoe
