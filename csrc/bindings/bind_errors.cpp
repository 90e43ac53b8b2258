#include <exception>
#include <new>
#include <string>
#include <system_error>
#include <utility>

#include "base/error.hpp"
#include "bindings/bind.hpp"

namespace py = pybind11;

namespace spmoe {
namespace {

py::handle error_type;
py::handle out_of_memory_type;

/// Errors of the standard library, which come where the system runs out of something.
void translate_shortage(std::exception_ptr thrown) {
  try {
    std::rethrow_exception(std::move(thrown));
  } catch (const std::system_error& error) {
    const std::string what = error.what();
    if (error.code() == std::errc::resource_unavailable_try_again) {
      const std::string message =
          "a thread could not be started (" + what +
          "); lower copy_threads and compute_threads, or raise the limits on threads and memory: "
          "ulimit -u, ulimit -v, the container's limit on pids";
      py::set_error(out_of_memory_type, message.c_str());
    } else {
      const std::string message =
          "the system refused a call (" + what + "); free what other processes hold and try again";
      py::set_error(error_type, message.c_str());
    }
  } catch (const std::bad_alloc&) {
    py::set_error(out_of_memory_type,
                  "the system gives this process no more memory; lower expert_memory, trace_spans, "
                  "copy_threads or compute_threads, or raise its limit: ulimit -v, the container's "
                  "limit on memory");
  }
}

}  // namespace

void bind_errors(py::module_& m) {
  // Translators run newest first: register a base before the classes derived from it.
  py::register_local_exception_translator(translate_shortage);
  auto error = py::register_exception<Error>(m, "Error");
  py::register_exception<InvalidArgument>(m, "InvalidArgument",
                                          py::make_tuple(error, py::handle(PyExc_ValueError)));
  auto out_of_memory = py::register_exception<OutOfMemory>(
      m, "OutOfMemory", py::make_tuple(error, py::handle(PyExc_MemoryError)));
  auto device = py::register_exception<DeviceError>(
      m, "DeviceError", py::make_tuple(error, py::handle(PyExc_OSError)));
  auto checkpoint = py::register_exception<CheckpointError>(
      m, "CheckpointError", py::make_tuple(error, py::handle(PyExc_ValueError)));
  py::register_exception<CheckpointChanged>(m, "CheckpointChanged",
                                            py::make_tuple(checkpoint, device));
  error_type = error;
  out_of_memory_type = out_of_memory;
}

}  // namespace spmoe
