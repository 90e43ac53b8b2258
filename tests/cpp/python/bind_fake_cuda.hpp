#pragma once

#include <pybind11/pybind11.h>

namespace spmoe {

/// Adds the submodule `fake_cuda`: the only session of the fake runtime, and a stream of it that
/// plays the one that torch works on.
void bind_fake_cuda(pybind11::module_& m);

}  // namespace spmoe
