#include "base/error.hpp"
#include "bindings/bind.hpp"

namespace py = pybind11;

namespace spmoe {

void bind_errors(py::module_& m) {
  // Translators run newest first: register a base before the classes derived from it.
  auto error = py::register_exception<Error>(m, "Error");
  py::register_exception<InvalidArgument>(m, "InvalidArgument",
                                          py::make_tuple(error, py::handle(PyExc_ValueError)));
  py::register_exception<OutOfMemory>(m, "OutOfMemory",
                                      py::make_tuple(error, py::handle(PyExc_MemoryError)));
  auto device = py::register_exception<DeviceError>(
      m, "DeviceError", py::make_tuple(error, py::handle(PyExc_OSError)));
  auto checkpoint = py::register_exception<CheckpointError>(
      m, "CheckpointError", py::make_tuple(error, py::handle(PyExc_ValueError)));
  py::register_exception<CheckpointChanged>(m, "CheckpointChanged",
                                            py::make_tuple(checkpoint, device));
}

}  // namespace spmoe
