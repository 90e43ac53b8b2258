#include <pybind11/pybind11.h>

#include "bindings/bind.hpp"
#include "device/cuda/cuda_device.hpp"

namespace py = pybind11;

namespace spmoe {

void bind_device(py::module_& m) {
  m.def(
      "cuda_status",
      [] {
        const CudaStatus status = cuda_status();
        return py::make_tuple(status.device_count, status.reason);
      },
      "How many CUDA devices there are, and if none, why.");
  m.def("cuda_device_problem", &cuda_device_problem, py::arg("index"),
        "Why the CUDA device of an index cannot be used; empty if it can.");
}

}  // namespace spmoe
