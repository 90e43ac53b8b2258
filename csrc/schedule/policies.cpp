#include "schedule/policies.hpp"

#include <algorithm>
#include <array>

#include "base/error.hpp"

namespace spmoe {
namespace {

constexpr std::array prefetch_rows{
    PrefetchEntry{
        .name = "on-demand",
        .eviction = "lru",
        .default_eviction = "predicted-use",
        .make = [](const PolicyView&, const PrefetchLimits&) { return make_on_demand(); }},
    PrefetchEntry{
        .name = "next-gate",
        .eviction = "lru",
        .reads = {.target = true},
        .make = [](const PolicyView& v, const PrefetchLimits&) { return make_next_gate(v); }},
    PrefetchEntry{.name = "activation-trace",
                  .eviction = "activation-reuse",
                  .make = [](const PolicyView& v,
                             const PrefetchLimits&) { return make_activation_trace(v); }},
    PrefetchEntry{
        .name = "sp-moe",
        .eviction = "lru",
        .reads = {.draft = true},
        .limited_by = LimitedBy::cutoff_layer,
        .make = [](const PolicyView& v, const PrefetchLimits& l) { return make_sp_moe(v, l); }},
    PrefetchEntry{
        .name = "horizon",
        .eviction = "predicted-use",
        .reads = {.draft = true, .target = true},
        .limited_by = LimitedBy::break_even,
        .make = [](const PolicyView& v, const PrefetchLimits& l) { return make_horizon(v, l); }},
    PrefetchEntry{
        .name = "oracle",
        .eviction = "belady",
        .replays = true,
        .make = [](const PolicyView& v, const PrefetchLimits&) { return make_oracle(v); }},
};

constexpr std::array eviction_rows{
    EvictionEntry{.name = "lru",
                  .make = [](const PolicyView& v) { return make_lru(v.shape.slot_count); }},
    EvictionEntry{.name = "lfu",
                  .make = [](const PolicyView& v) { return make_lfu(v.shape.slot_count); }},
    EvictionEntry{.name = "next-use",
                  .make =
                      [](const PolicyView& v) {
                        return make_next_use(v.shape.slot_count, v.shape.layer_count);
                      }},
    EvictionEntry{.name = "least-stale",
                  .make =
                      [](const PolicyView& v) {
                        return make_least_stale(v.shape.slot_count, v.shape.layer_count);
                      }},
    EvictionEntry{.name = "predicted-use",
                  .make =
                      [](const PolicyView& v) {
                        return make_predicted_use(v.forecast, v.shape.layer_count);
                      }},
    EvictionEntry{.name = "activation-reuse",
                  .make = [](const PolicyView& v) { return make_activation_reuse(v.history); }},
    EvictionEntry{.name = "belady",
                  .replays = true,
                  .make = [](const PolicyView& v) { return make_belady(v.trace); }},
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
