#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <string_view>
#include <utility>

#include "base/error.hpp"
#include "bindings/bind.hpp"
#include "runtime/runtime.hpp"

namespace py = pybind11;

namespace spmoe {
namespace {

using Scores = py::array_t<float, py::array::c_style>;

/// The value that `name` stands for in `table`, or InvalidArgument listing the choices.
template <class Value, std::size_t N>
Value look_up(const std::array<std::pair<std::string_view, Value>, N>& table, std::string_view what,
              std::string_view name) {
  std::string choices;
  for (const auto& [known, value] : table) {
    if (known == name) return value;
    choices += (choices.empty() ? "" : ", ") + std::string{known};
  }
  throw InvalidArgument{std::string{what} + " \"" + std::string{name} + "\" is not one of " +
                        choices};
}

DType parse_dtype(std::string_view name) {
  static constexpr std::array table{std::pair{std::string_view{"float32"}, DType::f32},
                                    std::pair{std::string_view{"float16"}, DType::f16},
                                    std::pair{std::string_view{"bfloat16"}, DType::bf16}};
  return look_up(table, "dtype", name);
}

Activation parse_activation(std::string_view name) {
  static constexpr std::array table{
      std::pair{std::string_view{"silu"}, Activation::silu},
      std::pair{std::string_view{"gelu"}, Activation::gelu},
      std::pair{std::string_view{"gelu_tanh"}, Activation::gelu_tanh},
      std::pair{std::string_view{"clamped_swiglu"}, Activation::clamped_swiglu}};
  return look_up(table, "activation", name);
}

py::dict to_dict(const LayerStats& stats) {
  using namespace py::literals;
  return py::dict("hits"_a = stats.hits, "late"_a = stats.late, "misses"_a = stats.misses,
                  "demand_bytes"_a = stats.demand_bytes,
                  "prefetch_used_bytes"_a = stats.prefetch_used_bytes,
                  "prefetch_wasted_bytes"_a = stats.prefetch_bytes - stats.prefetch_used_bytes,
                  "predictions"_a = stats.predictions, "stall_s"_a = stats.stall_s,
                  "compute_s"_a = stats.compute_s);
}

py::dict to_dict(const RuntimeStats& stats) {
  using namespace py::literals;
  LayerStats total;
  py::list layers;
  for (const LayerStats& layer : stats.layers) {
    total += layer;
    layers.append(to_dict(layer));
  }
  py::dict result = to_dict(total);
  result.attr("update")(py::dict("link_bytes"_a = stats.link.bytes,
                                 "link_busy_s"_a = stats.link.busy_s, "slots"_a = stats.slot_count,
                                 "resident"_a = stats.resident_count,
                                 "iterations"_a = stats.iterations, "accepted"_a = stats.accepted,
                                 "isa"_a = stats.isa, "layers"_a = layers));
  return result;
}

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_runtime(py::module_& m) {
  py::class_<Runtime>(m, "Runtime",
                      "The native runtime; see `spmoe.Runtime`, which checks its arguments.")
      .def(py::init([](std::shared_ptr<ExpertStore> store, std::uint64_t expert_memory_bytes,
                       std::uint32_t experts_per_token, std::string_view activation, float alpha,
                       float limit, unsigned compute_threads, unsigned copy_threads,
                       double link_gbps, std::string isa) {
             RuntimeOptions options;
             options.expert_memory_bytes = expert_memory_bytes;
             options.experts_per_token = experts_per_token;
             options.activation = {parse_activation(activation), alpha, limit};
             options.compute_threads = compute_threads;
             options.isa = std::move(isa);
             options.device.copy_threads = copy_threads;
             options.device.link_gbps = link_gbps;
             py::gil_scoped_release unlocked;
             return std::make_unique<Runtime>(std::move(store), options);
           }),
           py::arg("store"), py::arg("expert_memory_bytes"), py::arg("experts_per_token"),
           py::arg("activation") = "silu", py::arg("alpha") = 1.702F, py::arg("limit") = 7.0F,
           py::arg("compute_threads") = 0U, py::arg("copy_threads") = 2U,
           py::arg("link_gbps") = 0.0, py::arg("isa") = "auto")
      .def(
          "forward",
          [](Runtime& runtime, std::uint16_t layer, std::uint32_t tokens, std::uint32_t k,
             std::uintptr_t x, std::string_view x_dtype, std::uintptr_t top_k_index,
             std::uintptr_t top_k_weights, std::string_view weights_dtype, std::uintptr_t out) {
            const ForwardArgs args{tokens,
                                   k,
                                   pointer<const void>(x),
                                   parse_dtype(x_dtype),
                                   pointer<const std::int64_t>(top_k_index),
                                   pointer<const void>(top_k_weights),
                                   parse_dtype(weights_dtype),
                                   pointer<void>(out)};
            py::gil_scoped_release unlocked;
            runtime.forward(layer, args);
          },
          py::arg("layer"), py::arg("tokens"), py::arg("k"), py::arg("x"), py::arg("x_dtype"),
          py::arg("top_k_index"), py::arg("top_k_weights"), py::arg("weights_dtype"),
          py::arg("out"), "One MoE layer over contiguous tensors, given by their addresses.")
      .def(
          "predict",
          [](Runtime& runtime, std::uint16_t layer, const Scores& scores) {
            const std::span values{scores.data(), static_cast<std::size_t>(scores.size())};
            py::gil_scoped_release unlocked;
            runtime.predict(layer, values);
          },
          py::arg("layer"), py::arg("scores"), "Scores of the target's router, float32 [experts].")
      .def("end_iteration", &Runtime::end_iteration, py::arg("accepted"),
           py::call_guard<py::gil_scoped_release>())
      .def(
          "inject",
          [](Runtime& runtime, std::uint64_t fail_at_copy, std::uint32_t delay_seed,
             std::uint32_t max_delay_us) {
            runtime.inject({fail_at_copy, delay_seed, max_delay_us});
          },
          py::arg("fail_at_copy") = 0U, py::arg("delay_seed") = 0U, py::arg("max_delay_us") = 0U,
          "Plant faults in the link, for tests: the n-th piece fails, pieces wait at random.")
      .def("stats", [](const Runtime& runtime) { return to_dict(runtime.stats()); })
      .def("close", &Runtime::close, py::call_guard<py::gil_scoped_release>());
}

}  // namespace spmoe
