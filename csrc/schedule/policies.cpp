#include "schedule/policies.hpp"

#include <algorithm>
#include <array>

#include "base/error.hpp"

namespace spmoe {
namespace {

constexpr std::array prefetch_rows{
    PrefetchEntry{.name = "on-demand",
                  .eviction = "lru",
                  .default_eviction = "predicted-use",
                  .make = make_on_demand},
    PrefetchEntry{
        .name = "next-gate", .eviction = "lru", .reads = {.target = true}, .make = make_next_gate},
    PrefetchEntry{
        .name = "activation-trace", .eviction = "activation-reuse", .make = make_activation_trace},
    PrefetchEntry{.name = "sp-moe",
                  .eviction = "lru",
                  .reads = {.draft = true},
                  .limited_by = LimitedBy::cutoff_layer,
                  .make = make_sp_moe},
    PrefetchEntry{.name = "horizon",
                  .eviction = "predicted-use",
                  .reads = {.draft = true, .target = true},
                  .limited_by = LimitedBy::break_even,
                  .make = make_horizon},
    PrefetchEntry{.name = "oracle", .eviction = "belady", .replays = true, .make = make_oracle},
};

constexpr std::array eviction_rows{
    EvictionEntry{.name = "lru", .make = make_lru},
    EvictionEntry{.name = "lfu", .make = make_lfu},
    EvictionEntry{.name = "next-use", .make = make_next_use},
    EvictionEntry{.name = "least-stale", .make = make_least_stale},
    EvictionEntry{.name = "predicted-use", .make = make_predicted_use},
    EvictionEntry{.name = "activation-reuse", .make = make_activation_reuse},
    EvictionEntry{.name = "belady", .replays = true, .make = make_belady},
};

template <class Row>
const Row& find(std::span<const Row> rows, std::string_view what, std::string_view name) {
  const auto found = std::ranges::find(rows, name, &Row::name);
  if (found != rows.end()) return *found;
  std::string choices;
  for (const Row& row : rows) choices += (choices.empty() ? "" : ", ") + std::string{row.name};
  throw InvalidArgument{std::string{what} + " policy \"" + std::string{name} +
                        "\" asked; use one of " + choices};
}

}  // namespace

std::span<const PrefetchEntry> prefetch_policies() noexcept { return prefetch_rows; }

std::span<const EvictionEntry> eviction_policies() noexcept { return eviction_rows; }

const PrefetchEntry& prefetch_policy(const PolicyNames& names) {
  return find(prefetch_policies(), "prefetch", names.prefetch);
}

const EvictionEntry& eviction_policy(const PolicyNames& names) {
  const std::string_view name =
      names.eviction == "auto" ? prefetch_policy(names).eviction : std::string_view{names.eviction};
  return find(eviction_policies(), "eviction", name);
}

}  // namespace spmoe
