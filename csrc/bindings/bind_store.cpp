#include <pybind11/stl.h>

#include <functional>
#include <map>
#include <string>

#include "bindings/bind.hpp"
#include "store/expert_store.hpp"

namespace py = pybind11;

namespace spmoe {

void bind_store(py::module_& m) {
  py::class_<ExpertStore, std::shared_ptr<ExpertStore>>(
      m, "ExpertStore", "Where the blobs of a model's routed experts rest. Immutable.")
      .def(py::init([](const std::vector<std::string>& files, std::vector<std::uint32_t> layers,
                       bool interleaved, std::map<std::string, std::string, std::less<>> names) {
             const std::vector<std::filesystem::path> paths{files.begin(), files.end()};
             py::gil_scoped_release unlocked;
             return std::const_pointer_cast<ExpertStore>(
                 ExpertStore::open(paths, {std::move(layers), interleaved, std::move(names)}));
           }),
           py::arg("files"), py::arg("layers") = std::vector<std::uint32_t>{},
           py::arg("interleaved") = false,
           py::arg("names") = std::map<std::string, std::string, std::less<>>{},
           R"doc(
Open the safetensors shards of a checkpoint and find its experts. Reads headers only.

Args:
    files: Paths of every shard.
    layers: Layer numbers, as in the tensors' names, in the order of MoE layers; empty means all.
    interleaved: Gate and up alternate in the fused tensor (gpt_oss).
    names: Names of expert tensors in the shards, with one of spmoe's own names for each; empty
        means that the shards use such names.

Raises:
    CheckpointError: A shard is damaged or lacks a tensor, or experts differ in shape or dtype.
    InvalidArgument: No tensor is an expert's.
)doc")
      .def_property_readonly("layer_count", &ExpertStore::layer_count)
      .def_property_readonly("expert_count", &ExpertStore::expert_count)
      .def_property_readonly("hidden", [](const ExpertStore& s) { return s.format().hidden; })
      .def_property_readonly("inter", [](const ExpertStore& s) { return s.format().inter; })
      .def_property_readonly("dtype",
                             [](const ExpertStore& s) { return name_of(s.format().dtype); })
      .def_property_readonly("blob_bytes", [](const ExpertStore& s) { return s.format().bytes(); })
      .def_property_readonly("total_bytes",
                             [](const ExpertStore& s) {
                               return s.format().bytes() * s.layer_count() * s.expert_count();
                             })
      .def_property_readonly("tensor_names", &ExpertStore::tensor_names)
      .def("check_unchanged", &ExpertStore::check_unchanged, R"doc(
Compare size and time of writing of every shard with those from when it was opened.

Raises:
    CheckpointChanged: A shard was written to.
)doc");
}

}  // namespace spmoe
