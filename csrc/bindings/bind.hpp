#pragma once

#include <pybind11/pybind11.h>

namespace spmoe {

void bind_errors(pybind11::module_& m);
void bind_store(pybind11::module_& m);
void bind_counters(pybind11::module_& m);
void bind_device(pybind11::module_& m);
void bind_runtime(pybind11::module_& m);
void bind_policies(pybind11::module_& m);

}  // namespace spmoe
