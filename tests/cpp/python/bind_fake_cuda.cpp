#include "python/bind_fake_cuda.hpp"

#include <pybind11/stl.h>

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "base/error.hpp"
#include "bindings/unlocked.hpp"
#include "device/cuda/handle.hpp"
#include "fake_cuda.hpp"

namespace py = pybind11;

namespace spmoe {
namespace {

using fake_cuda::Session;

std::vector<std::string> complaints;
// Neither ends with the process: objects of Python that use them may still be alive then.
Session* session = nullptr;
cudaStream_t consumer = nullptr;

void start(const fake_cuda::Settings& settings) {
  session = new Session{settings};
  cuda::check(cudaStreamCreateWithPriority(&consumer, cudaStreamNonBlocking, 0),
              "cudaStreamCreateWithPriority");
}

/// Ends the session and starts another. Returns what it left behind or had out of order.
std::vector<std::string> restart(const fake_cuda::Settings& settings) {
  static_cast<void>(cudaStreamDestroy(std::exchange(consumer, nullptr)));
  if (const std::string left = session->leftovers(); !left.empty()) {
    cuda::check(cudaStreamCreateWithPriority(&consumer, cudaStreamNonBlocking, 0),
                "cudaStreamCreateWithPriority");
    throw Error{"the fake CUDA runtime cannot restart while it holds " + left +
                ": close what uses it"};
  }
  delete std::exchange(session, nullptr);
  start(settings);
  return std::exchange(complaints, {});
}

std::function<bool(cudaStream_t)> streams_named(const std::string& name) {
  if (name == "consumer") return [](cudaStream_t stream) { return stream == consumer; };
  if (name == "copies") return [](cudaStream_t stream) { return stream != consumer; };
  throw InvalidArgument{"streams \"" + name + "\" are not one of consumer, copies"};
}

}  // namespace

void fake_cuda::complain(const std::string& what) { complaints.push_back(what); }

void bind_fake_cuda(py::module_& core) {
  py::module_ m = core.def_submodule("fake_cuda", "The fake CUDA runtime under the backend.");
  start({.foreign_device_memory = true});
  m.def(
      "restart",
      [](int device_count, std::size_t memory_bytes, std::size_t pinned_bytes,
         std::uint32_t delay_seed, std::uint32_t max_delay_us) {
        const Unlocked unlocked;
        return restart({.device_count = device_count,
                        .memory_bytes = memory_bytes,
                        .pinned_bytes = pinned_bytes,
                        .delay_seed = delay_seed,
                        .max_delay_us = max_delay_us,
                        .foreign_device_memory = true});
      },
      py::arg("device_count") = 1, py::arg("memory_bytes") = std::size_t{1} << 30,
      py::arg("pinned_bytes") = std::size_t{1} << 30, py::arg("delay_seed") = 1U,
      py::arg("max_delay_us") = 30U,
      "Start anew with nothing planted; return what was out of order before.");
  m.def("consumer", [] { return reinterpret_cast<std::uintptr_t>(consumer); });
  m.def(
      "observe_consumer",
      [] {
        const Unlocked unlocked;
        session->observe_end(consumer);
      },
      "Wait for all work of the consumer, without ordering later work behind it.");
  m.def("synchronize", [] {
    const Unlocked unlocked;
    return static_cast<int>(cudaStreamSynchronize(consumer));
  });
  m.def("memory", [] {
    std::size_t free_bytes = 0;
    std::size_t total_bytes = 0;
    cuda::check(cudaMemGetInfo(&free_bytes, &total_bytes), "cudaMemGetInfo");
    return py::make_tuple(free_bytes, total_bytes);
  });
  m.def("violations", [] { return session->take_violations(); });
  m.def("leftovers", [] { return session->leftovers(); });
  m.def(
      "calls", [](const std::string& function) { return session->calls(function); },
      py::arg("function"));
  m.def(
      "fail",
      [](const std::string& function, std::uint64_t nth, int error) {
        session->fail(function, nth, static_cast<cudaError_t>(error));
      },
      py::arg("function"), py::arg("nth"), py::arg("error"));
  m.def(
      "forget_waits_of_streams",
      [](const std::string& streams) {
        session->forget(Session::Wait::of_stream, streams_named(streams));
      },
      py::arg("streams"), "Waits of \"consumer\" or of \"copies\" for events are left out.");
  m.def("remember", [] {
    const Unlocked unlocked;
    session->remember();
  });
  m.def(
      "fail_copy_in_flight", [](std::uint64_t nth) { session->fail_copy_in_flight(nth); },
      py::arg("nth"));
  m.def(
      "lose_context_at_copy",
      [](std::uint64_t nth, int error) {
        session->lose_context_at_copy(nth, static_cast<cudaError_t>(error));
      },
      py::arg("nth"), py::arg("error"));
}

}  // namespace spmoe
