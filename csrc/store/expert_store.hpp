#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/blob.hpp"
#include "base/types.hpp"

namespace spmoe {

/// Facts about the experts that tensor names and shapes do not say, from the caller. They do say
/// whether fused tensors are transposed.
struct ExpertStoreOptions {
  /// Layer numbers, as in the tensors' names, in the order of MoE layers. Empty: every layer
  /// that has experts, ascending. Expert tensors of other layers are ignored.
  std::vector<std::uint32_t> layers;
  bool interleaved = false;  ///< gate and up alternate in the fused tensor (gpt_oss); no effect
                             ///< where they are two tensors
  /// Names of expert tensors in the files, and a name that `parse_expert_tensor_name` understands
  /// for each, by which messages call it. Tensors without one are ignored. Empty: the names in
  /// the files are understood as they are.
  std::map<std::string, std::string, std::less<>> names{};
};

/// Where the blobs of a model's routed experts rest: extents in the checkpoint's own safetensors
/// shards, which stay open. Immutable after `open`, so thread-safe.
class ExpertStore {
 public:
  /// Reads the headers of `files`, never the weights. A file may be renamed or removed later, but
  /// not written to.
  /// @throws CheckpointError if a file is damaged, an expert lacks a tensor, two tensors claim
  ///         one place, a wanted layer has no experts, or dtypes or shapes differ between experts;
  ///         InvalidArgument if no tensor is an expert's, or a layer is wanted twice.
  static std::shared_ptr<const ExpertStore> open(const std::vector<std::filesystem::path>& files,
                                                 const ExpertStoreOptions& options = {});
  virtual ~ExpertStore() = default;

  [[nodiscard]] virtual const BlobFormat& format() const noexcept = 0;
  [[nodiscard]] virtual std::uint16_t layer_count() const noexcept = 0;
  [[nodiscard]] virtual std::uint16_t expert_count() const noexcept = 0;  ///< in each layer

  /// The extents of one blob, in blob order; their bytes add up to `format().bytes()`. Neighbours
  /// in one file are one extent. @throws InvalidArgument if there is no such expert.
  [[nodiscard]] virtual std::span<const Extent> extents(ExpertId expert) const = 0;

  /// "expert 5 of layer 3 (model-00002-of-00003.safetensors)", for error messages; with
  /// "layers.4 in " before the file where the checkpoint numbers the layer so.
  /// @throws InvalidArgument if there is no such expert.
  [[nodiscard]] virtual std::string describe(ExpertId expert) const = 0;

  /// Names in the files of the tensors that the blobs consist of, sorted.
  [[nodiscard]] virtual std::vector<std::string> tensor_names() const = 0;

  /// One system call a file. @throws CheckpointChanged, naming the file, if it has another size or
  /// time of writing than when it was opened.
  virtual void check_unchanged() const = 0;
};

}  // namespace spmoe
