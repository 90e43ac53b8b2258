#include "bindings/bind.hpp"

PYBIND11_MODULE(_core, m) {
  m.doc() = "Native runtime of spmoe. Use the documented classes in `spmoe`, not this module.";
  spmoe::bind_errors(m);
  spmoe::bind_store(m);
  spmoe::bind_device(m);
  spmoe::bind_counters(m);
  spmoe::bind_runtime(m);
  spmoe::bind_policies(m);
}
