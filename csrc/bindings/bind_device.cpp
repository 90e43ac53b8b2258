#include <pybind11/pybind11.h>

#include "bindings/bind.hpp"
#include "device/cuda_device.hpp"

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
}

}  // namespace spmoe
