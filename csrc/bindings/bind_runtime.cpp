#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "base/error.hpp"
#include "bindings/bind.hpp"
#include "bindings/bound_store.hpp"
#include "bindings/unlocked.hpp"
#include "device/copy/faulty_movers.hpp"
#include "runtime/counters.hpp"
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
                  "repeated"_a = stats.repeated, "demand_bytes"_a = stats.demand_bytes,
                  "prefetch_used_bytes"_a = stats.prefetch_used_bytes,
                  "prefetch_wasted_bytes"_a = stats.prefetch_bytes - stats.prefetch_used_bytes,
                  "predictions"_a = stats.predictions, "cancelled"_a = stats.cancelled,
                  "cancelled_bytes"_a = stats.cancelled_bytes,
                  "predicted_accesses"_a = stats.predicted_accesses, "recalled"_a = stats.recalled,
                  "recalled_2k"_a = stats.recalled_2k, "critical"_a = stats.critical,
                  "stall_s"_a = stats.stall_s, "compute_s"_a = stats.compute_s);
}

py::dict to_dict(const RuntimeStats& stats, bool by_layer) {
  using namespace py::literals;
  LayerStats total;
  for (const LayerStats& layer : stats.layers) total += layer;
  py::dict result = to_dict(total);
  result.attr("update")(py::dict(
      "link_bytes"_a = stats.link.bytes, "link_busy_s"_a = stats.link.busy_s,
      "slots"_a = stats.slot_count, "resident"_a = stats.resident_count,
      "iterations"_a = stats.iterations, "accepted"_a = stats.accepted, "isa"_a = stats.isa,
      "policy"_a = stats.policy, "eviction"_a = stats.eviction, "queue_depth"_a = stats.queue_depth,
      "prefetch_before_demand"_a = stats.link.prefetch_before_demand, "device"_a = stats.device,
      "pinned_bytes"_a = stats.pinned_bytes, "pinned_fill_s"_a = stats.pinned_fill_s,
      "dropped_predictions"_a = stats.dropped_predictions));
  if (by_layer) {
    py::list layers;
    for (const LayerStats& layer : stats.layers) layers.append(to_dict(layer));
    result["layers"] = layers;
  }
  return result;
}

using Routing = std::vector<std::pair<std::uint16_t, std::vector<std::uint16_t>>>;

Routing to_list(RoutingTrace trace) {
  trace.rewind();
  Routing routing;
  routing.reserve(trace.remaining());
  for (std::size_t i = 0; i < trace.remaining(); ++i) {
    const auto [layer, experts] = trace.upcoming(i);
    routing.emplace_back(layer, std::vector<std::uint16_t>{experts.begin(), experts.end()});
  }
  return routing;
}

PredictionSource parse_source(std::string_view name) {
  static constexpr std::array table{
      std::pair{std::string_view{"draft"}, PredictionSource::draft},
      std::pair{std::string_view{"target"}, PredictionSource::target}};
  return look_up(table, "source", name);
}

std::string_view name_of(Track track) {
  static constexpr std::array<std::string_view, 4> names{"compute", "wait", "demand", "prefetch"};
  return names[static_cast<std::size_t>(track)];
}

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

/// Lets other Python threads run while the last copies end. A forked child keeps the object: its
/// threads are not there to be joined, and threads of the parent may hold its locks for good.
struct RuntimeDeleter {
  void operator()(Runtime* runtime) const noexcept {
    if (!runtime->in_own_process()) return;
    const Unlocked unlocked;
    delete runtime;
  }
};
using RuntimePtr = std::unique_ptr<Runtime, RuntimeDeleter>;

}  // namespace

void bind_runtime(py::module_& m) {
  py::class_<FaultPlan, std::shared_ptr<FaultPlan>>(
      m, "FaultPlan", "Faults that a test plants in the links of the runtimes it gives this to.")
      .def(py::init())
      .def(
          "plant",
          [](FaultPlan& plan, std::uint64_t fail_at_chunk, std::uint32_t delay_seed,
             std::uint32_t max_delay_us) { plan.plant({fail_at_chunk, delay_seed, max_delay_us}); },
          py::arg("fail_at_chunk") = 0U, py::arg("delay_seed") = 0U, py::arg("max_delay_us") = 0U,
          "From now on the n-th chunk fails, once, and chunks wait a random time.");
  py::class_<Runtime, RuntimePtr>(
      m, "Runtime", "The native runtime; see `spmoe.Runtime`, which checks its arguments.")
      .def(py::init([](const BoundStore& bound, std::uint64_t expert_memory_bytes,
                       std::uint32_t experts_per_token, std::string_view activation, float alpha,
                       float limit, unsigned compute_threads, unsigned copy_threads,
                       double link_gbps, std::string isa, std::string policy, std::string eviction,
                       std::size_t trace_spans, std::string device,
                       std::uint64_t pinned_memory_bytes, const py::object& pinned_progress,
                       std::shared_ptr<FaultPlan> faults) {
             auto store = bound.get();
             RuntimeOptions options;
             options.expert_memory_bytes = expert_memory_bytes;
             options.experts_per_token = experts_per_token;
             options.activation = {parse_activation(activation), alpha, limit};
             options.compute_threads = compute_threads;
             options.isa = std::move(isa);
             options.policies = {std::move(policy), std::move(eviction)};
             options.trace_spans = trace_spans;
             options.device = std::move(device);
             options.pinned_memory_bytes = pinned_memory_bytes;
             options.link.copy_threads = copy_threads;
             options.link.link_gbps = link_gbps;
             options.link.faults = std::move(faults);
             Unlocked unlocked;
             if (!pinned_progress.is_none()) {
               options.pinned_progress = [&](std::uint64_t done_bytes, std::uint64_t total_bytes) {
                 unlocked.with_gil([&] { pinned_progress(done_bytes, total_bytes); });
               };
             }
             return RuntimePtr{new Runtime{std::move(store), options}};
           }),
           py::arg("store"), py::arg("expert_memory_bytes"), py::arg("experts_per_token"),
           py::arg("activation") = "silu", py::arg("alpha") = 1.702F, py::arg("limit") = 7.0F,
           py::arg("compute_threads") = 0U, py::arg("copy_threads") = 2U,
           py::arg("link_gbps") = 0.0, py::arg("isa") = "auto",
           py::arg("policy") = PolicyNames{}.prefetch, py::arg("eviction") = PolicyNames{}.eviction,
           py::arg("trace_spans") = 0U, py::arg("device") = "host",
           py::arg("pinned_memory_bytes") = 0U, py::arg("pinned_progress") = py::none(),
           py::arg("faults") = py::none())
      .def(
          "forward",
          [](Runtime& runtime, std::uint16_t layer, std::uint32_t tokens, std::uint32_t k,
             std::uintptr_t x, std::string_view x_dtype, std::uintptr_t top_k_index,
             std::uintptr_t top_k_weights, std::string_view weights_dtype, std::uintptr_t out,
             std::uintptr_t consumer) {
            const LayerArgs args{tokens,
                                 k,
                                 pointer<const void>(x),
                                 parse_dtype(x_dtype),
                                 pointer<const std::int64_t>(top_k_index),
                                 pointer<const void>(top_k_weights),
                                 parse_dtype(weights_dtype),
                                 pointer<void>(out),
                                 consumer};
            const Unlocked unlocked;
            runtime.forward(layer, args);
          },
          py::arg("layer"), py::arg("tokens"), py::arg("k"), py::arg("x"), py::arg("x_dtype"),
          py::arg("top_k_index"), py::arg("top_k_weights"), py::arg("weights_dtype"),
          py::arg("out"), py::arg("consumer") = 0U,
          "One MoE layer over contiguous tensors, given by their addresses, on the stream "
          "consumer.")
      .def(
          "predict",
          [](Runtime& runtime, std::uint16_t layer, const Scores& scores, std::string_view source) {
            const std::span values{scores.data(), static_cast<std::size_t>(scores.size())};
            const PredictionSource from = parse_source(source);
            const Unlocked unlocked;
            runtime.predict(layer, values, from);
          },
          py::arg("layer"), py::arg("scores"), py::arg("source") = "draft",
          "Scores of the target's router, float32 [experts].")
      .def("begin_request", &Runtime::begin_request, py::call_guard<Unlocked>())
      .def(
          "set_limits",
          [](Runtime& runtime, std::uint16_t cutoff_layer, std::vector<std::uint64_t> budget_bytes,
             float break_even) {
            const Unlocked unlocked;
            runtime.set_limits({.cutoff_layer = cutoff_layer,
                                .budget_bytes = std::move(budget_bytes),
                                .break_even = break_even});
          },
          py::arg("cutoff_layer"), py::arg("budget_bytes"), py::arg("break_even"))
      .def(
          "plan",
          [](Runtime& runtime,
             const std::vector<std::pair<std::uint16_t, std::uint16_t>>& experts) {
            std::vector<ExpertId> ids;
            ids.reserve(experts.size());
            for (const auto& [layer, expert] : experts) ids.push_back({layer, expert});
            const Unlocked unlocked;
            runtime.plan(ids);
          },
          py::arg("experts"), "Replace the prefetches that wait by (layer, expert), in this order.")
      .def(
          "residency",
          [](const Runtime& runtime) {
            std::vector<std::uint8_t> resident;
            {
              const Unlocked unlocked;
              resident = runtime.residency();
            }
            return py::bytes{reinterpret_cast<const char*>(resident.data()), resident.size()};
          },
          "Whether each expert is resident or being filled: a byte, 1 or 0, for [layer, expert].")
      .def("record_routing", &Runtime::record_routing, py::arg("on"))
      .def("recorded_routing",
           [](const Runtime& runtime) { return to_list(runtime.recorded_routing()); })
      .def(
          "replay_routing",
          [](Runtime& runtime, const Routing& routing, std::uint16_t layer_count,
             std::uint16_t expert_count) {
            RoutingTrace trace{layer_count, expert_count};
            for (const auto& [layer, experts] : routing) trace.append(layer, experts);
            runtime.replay_routing(std::move(trace));
          },
          py::arg("routing"), py::arg("layer_count"), py::arg("expert_count"))
      .def(
          "spans",
          [](const Runtime& runtime) {
            py::list spans;
            for (const Span& span : runtime.spans()) {
              const bool whole = span.id.expert == Span::whole_layer;
              spans.append(py::make_tuple(
                  name_of(span.track), span.id.layer,
                  whole ? py::object{py::none()} : py::object{py::int_(span.id.expert)},
                  span.start_s, span.end_s, span.queue_depth));
            }
            return spans;
          },
          "The latest spans: (track, layer, expert or None, start_s, end_s, queue_depth).")
      .def(
          "calibration",
          [](const Runtime& runtime) {
            py::list buckets;
            for (const UseForecast::Bucket& bucket : runtime.calibration()) {
              buckets.append(py::make_tuple(bucket.score_from, bucket.predictions, bucket.used));
            }
            return buckets;
          },
          "Per bucket of scores: (score_from, weight of predictions, of these used).")
      .def(
          "predict_on_device",
          [](Runtime& runtime, std::uint16_t layer, std::uintptr_t scores, std::string_view source,
             std::uintptr_t consumer) {
            const PredictionSource from = parse_source(source);
            const Unlocked unlocked;
            runtime.predict(layer, pointer<const float>(scores), from, consumer);
          },
          py::arg("layer"), py::arg("scores"), py::arg("source"), py::arg("consumer"),
          "Router scores, float32 in device memory, made by work on the stream consumer.")
      .def("end_iteration", &Runtime::end_iteration, py::arg("accepted"),
           py::call_guard<Unlocked>())
      .def("reset", &Runtime::reset, py::call_guard<Unlocked>())
      .def(
          "stats",
          [](const Runtime& runtime, bool by_layer) { return to_dict(runtime.stats(), by_layer); },
          py::arg("by_layer") = true)
      .def("counters", [](const Runtime& runtime) { return add_up(runtime.stats()); })
      .def("close", &Runtime::close, py::call_guard<Unlocked>());
}

}  // namespace spmoe
