#include "store/expert_index.hpp"

#include <algorithm>
#include <iterator>
#include <set>
#include <utility>

#include "base/error.hpp"

namespace spmoe {
namespace {

using Layers = std::map<std::uint32_t, LayerExperts>;

void add(const ExpertTensorName& name, const TensorInfo& tensor, const SafetensorsFile& file,
         LayerExperts& layer) {
  layer.number = name.layer;
  if (name.naming == nullptr) {
    if (layer.unread.empty()) layer.unread = tensor.name;
    return;
  }
  if (layer.naming == nullptr) {
    layer.naming = name.naming;
    layer.prefix = name.prefix;
  }
  if (layer.naming != name.naming || layer.prefix != name.prefix) {
    throw CheckpointError{"layer " + std::to_string(name.layer) +
                          " has experts named in two ways, " + std::string{layer.prefix} + "..." +
                          std::string{layer.naming->names.front().suffix} + " and " + tensor.name +
                          "; spmoe reads one set of experts a layer, so use transformers for " +
                          "this model"};
  }
  PlacedTensor& place = layer.experts[name.expert][name.part];
  if (place.tensor != nullptr) {
    throw CheckpointError{"one place has two tensors, " + place.tensor->name + " in " +
                          place.file->name + " and " + tensor.name + " in " + file.name +
                          "; pass the shards of one checkpoint, each once"};
  }
  place = {&tensor, &file};
}

std::ptrdiff_t count_layers(const Layers& layers) {
  return std::ranges::count_if(layers,
                               [](const auto& layer) { return layer.second.naming != nullptr; });
}

Layers find_model(const std::vector<SafetensorsFile>& files, const Names& names) {
  std::map<std::string_view, Layers> stacks;
  for (const SafetensorsFile& file : files) {
    for (const TensorInfo& tensor : file.tensors) {
      const auto given = names.find(tensor.name);
      if (!names.empty() && given == names.end()) continue;
      const auto name = parse_expert_tensor_name(names.empty() ? tensor.name : given->second);
      if (name) add(*name, tensor, file, stacks[name->stack][name->layer]);
    }
  }
  const auto size = [](const auto& stack) { return count_layers(stack.second); };
  const auto largest = std::ranges::max_element(stacks, {}, size);
  if (largest == stacks.end() || size(*largest) == 0) {
    throw InvalidArgument{
        "no tensor in " + list_shortly(files) +
        " is a routed expert's (layers.<n>...experts.<e>.gate_proj.weight or .w1.weight, "
        "layers.<n>...experts.gate_up_proj or .fc1.weight, or "
        "layers.<n>...block_sparse_moe.input_linear.weight)" +
        (largest == stacks.end() ? "" : hint_at_unread(largest->second.begin()->second.unread)) +
        "; pass all shards of a mixture-of-experts model, and the names of its expert tensors if "
        "they are others"};
  }
  for (auto other = std::next(largest); other != stacks.end(); ++other) {
    if (size(*other) != size(*largest)) continue;
    throw CheckpointError{"experts are in two stacks of layers, \"" + std::string{largest->first} +
                          "layers\" and \"" + std::string{other->first} + "layers\", each of " +
                          std::to_string(size(*other)) +
                          ", and nothing tells which is the model; pass the shards of one model"};
  }
  return std::move(largest->second);
}

}  // namespace

std::vector<LayerExperts> find_experts(const std::vector<SafetensorsFile>& files,
                                       const std::vector<std::uint32_t>& wanted,
                                       const Names& names) {
  Layers found = find_model(files, names);
  std::vector<LayerExperts> selected;
  if (wanted.empty()) {
    for (auto& [number, layer] : found) {
      if (layer.naming != nullptr) selected.push_back(std::move(layer));
    }
    return selected;
  }
  std::set<std::uint32_t> seen;
  for (const std::uint32_t number : wanted) {
    const std::string name = "layer " + std::to_string(number);
    if (!seen.insert(number).second) {
      throw InvalidArgument{name + " is asked for twice; list each layer once"};
    }
    const auto layer = found.find(number);
    if (layer == found.end() || layer->second.naming == nullptr) {
      throw CheckpointError{name + " is asked for, but has no experts in " + list_shortly(files) +
                            ", where " + std::to_string(count_layers(found)) + " layers have some" +
                            (layer == found.end() ? "" : hint_at_unread(layer->second.unread)) +
                            "; download the checkpoint again and pass all of its shards"};
    }
    selected.push_back(std::move(layer->second));
  }
  return selected;
}

std::string list_shortly(const std::vector<std::string>& names) {
  constexpr std::size_t shown = 3;
  std::string text;
  for (std::size_t i = 0; i < std::min(names.size(), shown); ++i) {
    text += (i == 0 ? "" : ", ") + names[i];
  }
  if (names.size() > shown) text += " and " + std::to_string(names.size() - shown) + " more";
  return text;
}

std::string list_shortly(const std::vector<SafetensorsFile>& files) {
  std::vector<std::string> names;
  std::ranges::transform(files, std::back_inserter(names), &SafetensorsFile::name);
  return list_shortly(names);
}

std::string hint_at_unread(std::string_view unread) {
  if (unread.empty()) return "";
  return "; there is " + std::string{unread} +
         ", which spmoe does not read, so the experts may be quantized";
}

}  // namespace spmoe
