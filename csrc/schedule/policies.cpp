#include "schedule/policies.hpp"

#include <algorithm>
#include <array>
#include <string_view>

#include "base/error.hpp"

namespace spmoe {
namespace {

struct PrefetchEntry {
  std::string_view name;
  std::string_view eviction;
  std::unique_ptr<PrefetchPolicy> (*make)(const PolicyView&, const PrefetchLimits&);
};

struct EvictionEntry {
  std::string_view name;
  std::unique_ptr<EvictionPolicy> (*make)(const PolicyView&);
};

constexpr std::array prefetch_policies{
    PrefetchEntry{"on-demand", "lru",
                  [](const PolicyView&, const PrefetchLimits&) { return make_on_demand(); }},
    PrefetchEntry{"next-gate", "lru",
                  [](const PolicyView& v, const PrefetchLimits&) { return make_next_gate(v); }},
    PrefetchEntry{
        "activation-trace", "activation-reuse",
        [](const PolicyView& v, const PrefetchLimits&) { return make_activation_trace(v); }},
    PrefetchEntry{"sp-moe", "lru",
                  [](const PolicyView& v, const PrefetchLimits& l) { return make_sp_moe(v, l); }},
    PrefetchEntry{"horizon", "predicted-use",
                  [](const PolicyView& v, const PrefetchLimits& l) { return make_horizon(v, l); }},
    PrefetchEntry{"oracle", "belady",
                  [](const PolicyView& v, const PrefetchLimits&) { return make_oracle(v); }},
};

constexpr std::array eviction_policies{
    EvictionEntry{"lru", [](const PolicyView& v) { return make_lru(v.shape.slot_count); }},
    EvictionEntry{"lfu", [](const PolicyView& v) { return make_lfu(v.shape.slot_count); }},
    EvictionEntry{
        "next-use",
        [](const PolicyView& v) { return make_next_use(v.shape.slot_count, v.shape.layer_count); }},
    EvictionEntry{"least-stale",
                  [](const PolicyView& v) {
                    return make_least_stale(v.shape.slot_count, v.shape.layer_count);
                  }},
    EvictionEntry{
        "predicted-use",
        [](const PolicyView& v) { return make_predicted_use(v.forecast, v.shape.layer_count); }},
    EvictionEntry{"activation-reuse",
                  [](const PolicyView& v) { return make_activation_reuse(v.history); }},
    EvictionEntry{"belady", [](const PolicyView& v) { return make_belady(v.trace); }},
};

template <class Table>
std::vector<std::string> names_of(const Table& table) {
  std::vector<std::string> names;
  names.reserve(table.size());
  for (const auto& entry : table) names.emplace_back(entry.name);
  return names;
}

template <class Table>
const auto& find(const Table& table, std::string_view what, std::string_view name) {
  const auto found =
      std::ranges::find_if(table, [name](const auto& entry) { return entry.name == name; });
  if (found != table.end()) return *found;
  std::string choices;
  for (const std::string& choice : names_of(table))
    choices += (choices.empty() ? "" : ", ") + choice;
  throw InvalidArgument{std::string{what} + " policy \"" + std::string{name} +
                        "\" asked; use one of " + choices};
}

}  // namespace

std::vector<std::string> prefetch_policy_names() { return names_of(prefetch_policies); }

std::vector<std::string> eviction_policy_names() { return names_of(eviction_policies); }

std::unique_ptr<PrefetchPolicy> make_prefetch_policy(const PolicyNames& names,
                                                     const PolicyView& view,
                                                     const PrefetchLimits& limits) {
  return find(prefetch_policies, "prefetch", names.prefetch).make(view, limits);
}

std::unique_ptr<EvictionPolicy> make_eviction_policy(const PolicyNames& names,
                                                     const PolicyView& view) {
  const std::string_view name = names.eviction == "auto"
                                    ? find(prefetch_policies, "prefetch", names.prefetch).eviction
                                    : std::string_view{names.eviction};
  return find(eviction_policies, "eviction", name).make(view);
}

}  // namespace spmoe
