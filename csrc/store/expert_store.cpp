#include "store/expert_store.hpp"

#include <algorithm>
#include <limits>
#include <string_view>
#include <utility>

#include "base/error.hpp"
#include "store/expert_index.hpp"
#include "store/expert_layout.hpp"
#include "store/safetensors.hpp"

namespace spmoe {
namespace {

constexpr const char* download = "; download the checkpoint again and pass all of its shards";

/// The format that all experts of a model share.
struct CommonFormat {
  BlobFormat blob;
  const Naming* naming;
  std::uint64_t expert_count;  ///< in each layer
};

bool has_bias(const LayerExperts& layer) {
  return std::ranges::any_of(layer.experts, [&](const auto& expert) {
    return std::ranges::any_of(layer.naming->names, [&](const Naming::Name& name) {
      return name.is_bias && expert.second[name.part].tensor != nullptr;
    });
  });
}

/// The tensors of expert `number` of `layer` (0 if fused); throws if one is missing.
const ExpertTensors& require_tensors(const LayerExperts& layer, std::uint32_t number,
                                     bool with_bias, const std::vector<SafetensorsFile>& files) {
  static const ExpertTensors none;
  const auto found = layer.experts.find(number);
  const ExpertTensors& tensors = found == layer.experts.end() ? none : found->second;
  for (const Naming::Name& name : layer.naming->names) {
    if (tensors[name.part].tensor != nullptr || (name.is_bias && !with_bias)) continue;
    const std::string expert = layer.naming->fused ? "" : std::to_string(number) + ".";
    throw CheckpointError{"the tensor " + std::string{layer.prefix} + expert +
                          std::string{name.suffix} + " is missing from " + list_shortly(files) +
                          hint_at_unread(layer.unread) + download};
  }
  return tensors;
}

/// Deduces the format from the first expert and holds every other against it.
CommonFormat find_common_format(const std::vector<LayerExperts>& layers, bool interleaved,
                                const std::vector<SafetensorsFile>& files) {
  const Naming& naming = *layers.front().naming;
  std::uint64_t group_count = 1;  // sets of tensors in each layer
  bool with_bias = false;
  for (const LayerExperts& layer : layers) {
    if (layer.naming != &naming) {
      throw CheckpointError{
          "the experts of layers " + std::to_string(layers.front().number) + " and " +
          std::to_string(layer.number) + " are named in different ways, " +
          std::string{layers.front().prefix} + "..." + std::string{naming.names.front().suffix} +
          " and " + std::string{layer.prefix} + "..." +
          std::string{layer.naming->names.front().suffix} + "; pass the shards of one checkpoint"};
    }
    group_count = std::max<std::uint64_t>(group_count, layer.experts.rbegin()->first + 1ULL);
    with_bias = with_bias || has_bias(layer);
  }
  const ExpertTensors& first = require_tensors(layers.front(), 0, with_bias, files);
  const BlobFormat blob = deduce_format(first, naming, interleaved);
  const TensorInfo& reference = *first[naming.names.front().part].tensor;
  const std::uint64_t expert_count = naming.fused ? reference.shape.front() : group_count;
  if (std::max<std::uint64_t>(expert_count, layers.size()) >
      std::numeric_limits<std::uint16_t>::max()) {
    throw CheckpointError{"the checkpoint has " + std::to_string(layers.size()) + " layers of " +
                          std::to_string(expert_count) +
                          " experts, but spmoe holds at most 65535 of each" + download};
  }
  for (const LayerExperts& layer : layers) {
    for (std::uint32_t number = 0; number < group_count; ++number) {
      check_format(require_tensors(layer, number, with_bias, files), naming, blob, expert_count,
                   reference);
    }
  }
  return {blob, &naming, expert_count};
}

class CheckpointStore final : public ExpertStore {
 public:
  CheckpointStore(std::vector<SafetensorsFile> files, const std::vector<LayerExperts>& layers,
                  const CommonFormat& common)
      : format_{common.blob}, expert_count_{static_cast<std::uint16_t>(common.expert_count)} {
    for (const LayerExperts& layer : layers) {
      layer_numbers_.push_back(layer.number);
      for (std::uint16_t expert = 0; expert < expert_count_; ++expert) {
        starts_.push_back(extents_.size());
        append_blob(layer.experts.at(common.naming->fused ? 0 : expert), *common.naming, expert);
      }
      for (const auto& [number, tensors] : layer.experts) append_names(tensors, *common.naming);
    }
    starts_.push_back(extents_.size());
    std::ranges::sort(tensor_names_);
    for (SafetensorsFile& file : files) {
      files_.push_back({std::move(file.name), std::move(file.handle), file.stamp});
    }
  }

  const BlobFormat& format() const noexcept override { return format_; }
  std::uint16_t layer_count() const noexcept override {
    return static_cast<std::uint16_t>(layer_numbers_.size());
  }
  std::uint16_t expert_count() const noexcept override { return expert_count_; }
  std::vector<std::string> tensor_names() const override { return tensor_names_; }

  void check_unchanged() const override {
    for (const OpenFile& file : files_) {
      const FileStamp now = stamp_of(file.handle, file.name);
      if (now == file.stamp) continue;
      throw CheckpointChanged{
          file.name + " was written to after it was loaded (it had " +
          std::to_string(file.stamp.bytes) + " bytes, now " + std::to_string(now.bytes) +
          "), and experts are read from it; load the model again, and replace a file of a loaded "
          "checkpoint by renaming another one over it"};
    }
  }

  std::span<const Extent> extents(ExpertId expert) const override {
    if (expert.layer >= layer_count() || expert.expert >= expert_count_) {
      throw InvalidArgument{"expert " + std::to_string(expert.expert) + " of layer " +
                            std::to_string(expert.layer) + " asked, but the store has " +
                            std::to_string(layer_count()) + " layers of " +
                            std::to_string(expert_count_) + " experts"};
    }
    const std::size_t place = std::size_t{expert.layer} * expert_count_ + expert.expert;
    return std::span{extents_}.subspan(starts_[place], starts_[place + 1] - starts_[place]);
  }

  std::string describe(ExpertId expert) const override {
    std::vector<std::string> names;
    for (const Extent& extent : extents(expert)) {
      const auto file = std::ranges::find(files_, extent.file,
                                          [](const OpenFile& open) { return open.handle.get(); });
      if (std::ranges::find(names, file->name) == names.end()) names.push_back(file->name);
    }
    const std::uint32_t number = layer_numbers_[expert.layer];
    return "expert " + std::to_string(expert.expert) + " of layer " + std::to_string(expert.layer) +
           " (" + (number == expert.layer ? "" : "layers." + std::to_string(number) + " in ") +
           list_shortly(names) + ")";
  }

 private:
  struct OpenFile {
    std::string name;
    FileHandle handle;
    FileStamp stamp;
  };

  void append_blob(const ExpertTensors& tensors, const Naming& naming, std::uint16_t expert) {
    for (const Naming::Name& name : naming.names) {
      const auto& [tensor, file] = tensors[name.part];
      if (tensor == nullptr) continue;
      const std::uint64_t bytes = naming.fused ? tensor->bytes / expert_count_ : tensor->bytes;
      const std::uint64_t offset = tensor->offset + (naming.fused ? expert * bytes : 0);
      Extent* last = extents_.size() > starts_.back() ? &extents_.back() : nullptr;
      if (last != nullptr && last->file == file->handle.get() &&
          last->offset + last->bytes == offset) {
        last->bytes += bytes;
      } else {
        extents_.push_back({nullptr, file->handle.get(), offset, bytes});
      }
    }
  }

  void append_names(const ExpertTensors& tensors, const Naming& naming) {
    for (const Naming::Name& name : naming.names) {
      const TensorInfo* tensor = tensors[name.part].tensor;
      if (tensor != nullptr) tensor_names_.push_back(tensor->name);
    }
  }

  const BlobFormat format_;
  const std::uint16_t expert_count_;
  std::vector<OpenFile> files_;
  std::vector<std::uint32_t> layer_numbers_;  ///< by ordinal
  std::vector<Extent> extents_;               ///< of all blobs, by layer, then by expert
  std::vector<std::size_t> starts_;           ///< of each blob in `extents_`, and the end
  std::vector<std::string> tensor_names_;
};

}  // namespace

std::shared_ptr<const ExpertStore> ExpertStore::open(
    const std::vector<std::filesystem::path>& files, const ExpertStoreOptions& options) {
  if (files.empty()) {
    throw InvalidArgument{"no files were given; pass every safetensors shard of the checkpoint"};
  }
  std::vector<SafetensorsFile> opened;
  opened.reserve(files.size());
  for (const std::filesystem::path& file : files) opened.push_back(open_safetensors(file));
  const std::vector<LayerExperts> layers = find_experts(opened, options.layers, options.names);
  const CommonFormat common = find_common_format(layers, options.interleaved, opened);
  return std::make_shared<CheckpointStore>(std::move(opened), layers, common);
}

}  // namespace spmoe
