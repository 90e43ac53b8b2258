#include "bindings/bind.hpp"
#include "python/bind_fake_cuda.hpp"

// As csrc/bindings/module.cpp, and the fake CUDA runtime under the backend.
PYBIND11_MODULE(_core, m) {
  m.doc() = "The native runtime of spmoe over a fake CUDA runtime, for tests.";
  spmoe::bind_errors(m);
  spmoe::bind_store(m);
  spmoe::bind_device(m);
  spmoe::bind_counters(m);
  spmoe::bind_runtime(m);
  spmoe::bind_policies(m);
  spmoe::bind_fake_cuda(m);
}
