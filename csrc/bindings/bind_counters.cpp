#include "bindings/bind.hpp"
#include "runtime/counters.hpp"

namespace py = pybind11;

namespace spmoe {
namespace {

/// Counters from keywords; what is not given is 0.
Counters from_keywords(const py::kwargs& values) {
  Counters counters;
  std::size_t known = 0;
  Counters::for_each([&](const char* name, auto get) {
    if (!values.contains(name)) return;
    ++known;
    auto& counter = get(counters);
    counter = values[name].cast<std::decay_t<decltype(counter)>>();
  });
  if (known != values.size()) throw py::type_error{"Counters() got a name that is no counter"};
  return counters;
}

py::dict to_dict(const Counters& counters) {
  py::dict result;
  Counters::for_each([&](const char* name, auto get) { result[name] = py::cast(get(counters)); });
  return result;
}

}  // namespace

void bind_counters(py::module_& m) {
  py::class_<Counters> counters{
      m, "Counters",
      "Counters of a runtime, over all its layers; a difference says what happened meanwhile."};
  counters.def(py::init(&from_keywords));
  Counters::for_each([&](const char* name, auto get) {
    counters.def_property_readonly(name, [get](const Counters& self) { return get(self); });
  });
  counters.def_property_readonly("needed", &Counters::needed, "Experts that layers asked for.")
      .def_property_readonly("prefetch_wasted_bytes", &Counters::prefetch_wasted_bytes,
                             "Moved on a prediction and not used (yet).")
      .def(
          "__add__", [](const Counters& left, const Counters& right) { return left + right; },
          py::arg("other"), py::is_operator())
      .def(
          "__sub__", [](const Counters& left, const Counters& right) { return left - right; },
          py::arg("other"), py::is_operator())
      .def(
          "__eq__", [](const Counters& left, const Counters& right) { return left == right; },
          py::arg("other"), py::is_operator())
      .def(
          "add", [](Counters& self, const Counters& other) { self += other; }, py::arg("other"),
          "Add `other` in place.")
      .def("as_dict", &to_dict, "All counters by name.")
      .def("__repr__", [](const Counters& self) {
        return "Counters(**" + py::repr(to_dict(self)).cast<std::string>() + ")";
      });
  counters.attr("__hash__") = py::none();
}

}  // namespace spmoe
