#include <pybind11/stl.h>

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "bindings/bind.hpp"
#include "bindings/bound_store.hpp"
#include "bindings/unlocked.hpp"
#include "runtime/nonfinite.hpp"

namespace py = pybind11;

namespace spmoe {

void bind_store(py::module_& m) {
  py::class_<BoundStore>(
      m, "ExpertStore",
      "Where the blobs of a model's routed experts rest. Its sizes stay known once it is closed.")
      .def(py::init([](const std::vector<std::string>& files, std::vector<std::uint32_t> layers,
                       bool interleaved, std::map<std::string, std::string, std::less<>> names) {
             const std::vector<std::filesystem::path> paths{files.begin(), files.end()};
             const Unlocked unlocked;
             return std::make_unique<BoundStore>(
                 ExpertStore::open(paths, {std::move(layers), interleaved, std::move(names)}));
           }),
           py::arg("files"), py::arg("layers") = std::vector<std::uint32_t>{},
           py::arg("interleaved") = false,
           py::arg("names") = std::map<std::string, std::string, std::less<>>{},
           "Find the experts in the safetensors shards of a checkpoint; see `spmoe.open_store`.")
      .def_readonly("layer_count", &BoundStore::layer_count)
      .def_readonly("expert_count", &BoundStore::expert_count)
      .def_property_readonly("hidden", [](const BoundStore& s) { return s.format.hidden; })
      .def_property_readonly("inter", [](const BoundStore& s) { return s.format.inter; })
      .def_property_readonly("dtype", [](const BoundStore& s) { return name_of(s.format.dtype); })
      .def_property_readonly("blob_bytes", [](const BoundStore& s) { return s.format.bytes(); })
      .def_property_readonly(
          "total_bytes",
          [](const BoundStore& s) { return s.format.bytes() * s.layer_count * s.expert_count; })
      .def_readonly("tensor_names", &BoundStore::tensor_names)
      .def(
          "find_nonfinite",
          [](const BoundStore& bound, std::optional<std::uint16_t> layer, double budget_s) {
            const auto store = bound.get();
            using Found = std::tuple<std::uint16_t, std::uint16_t, std::string>;
            std::optional<Found> found;
            const Unlocked unlocked;
            const std::uint16_t first = layer.value_or(0);
            const auto last = static_cast<std::uint16_t>(layer ? first + 1 : bound.layer_count);
            if (const auto id = find_nonfinite(*store, first, last, budget_s)) {
              found = {id->layer, id->expert, store->describe(*id)};
            }
            return found;
          },
          py::arg("layer") = py::none(), py::arg("budget_s") = 1.0,
          R"doc(
Look in the files for an expert with a weight that is infinite or not a number.

Args:
    layer: MoE layer, 0-based; None means all, from the first.
    budget_s: Seconds after which the search ends without a result.

Returns:
    Layer, expert, and a description that names the file, of the first one; or None.

Raises:
    InvalidArgument: There is no such layer.
    Error: The store is closed.
)doc")
      .def(
          "check_unchanged", [](const BoundStore& bound) { bound.get()->check_unchanged(); },
          R"doc(
Compare size and time of writing of every shard with those from when it was opened.

Raises:
    CheckpointChanged: A shard was written to.
    Error: The store is closed.
)doc")
      .def("close", &BoundStore::close,
           R"doc(
Close the files, unless runtimes over them are open: then the last of these does.

May be called twice. No runtime can be opened over a closed store.
)doc");
}

}  // namespace spmoe
