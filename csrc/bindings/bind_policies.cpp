#include <pybind11/pybind11.h>

#include <string_view>

#include "bindings/bind.hpp"
#include "schedule/policies.hpp"

namespace py = pybind11;

namespace spmoe {
namespace {

using namespace py::literals;

py::object name_of(LimitedBy limited_by) {
  switch (limited_by) {
    case LimitedBy::cutoff_layer: return py::str{"cutoff_layer"};
    case LimitedBy::break_even: return py::str{"break_even"};
    case LimitedBy::nothing: break;
  }
  return py::none();
}

py::tuple names_of(const PredictedFrom& reads) {
  py::list names;
  if (reads.draft) names.append("draft");
  if (reads.target) names.append("target");
  return py::tuple{names};
}

py::list policies() {
  py::list rows;
  for (const PrefetchEntry& row : prefetch_policies()) {
    rows.append(py::dict("name"_a = row.name, "eviction"_a = row.eviction,
                         "default_eviction"_a = row.default_eviction,
                         "reads"_a = names_of(row.reads), "limited_by"_a = name_of(row.limited_by),
                         "replays"_a = row.replays));
  }
  return rows;
}

py::list evictions() {
  py::list rows;
  for (const EvictionEntry& row : eviction_policies()) {
    rows.append(py::dict("name"_a = row.name, "replays"_a = row.replays));
  }
  return rows;
}

}  // namespace

void bind_policies(py::module_& m) {
  m.def("policies", &policies,
        "Each prefetch policy as it describes itself; see `spmoe.policies.Traits`.");
  m.def("evictions", &evictions, "Each eviction policy: its name, and whether it replays routing.");
}

}  // namespace spmoe
