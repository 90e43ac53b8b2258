#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "store/expert_layout.hpp"
#include "store/safetensors.hpp"

namespace spmoe {

/// The expert tensors of one layer, as found; some may be missing. Views and pointers are into
/// the files it was found in, and into the names given.
struct LayerExperts {
  std::uint32_t number = 0;  ///< as in the tensors' names
  const Naming* naming = nullptr;
  std::string_view prefix;                         ///< of the names, up to the parent's dot
  std::string_view unread;                         ///< an experts' tensor that spmoe does not read
  std::map<std::uint32_t, ExpertTensors> experts;  ///< by number; fused: all of them at 0
};

/// Names of tensors in files, and the names to read them by; see `ExpertStoreOptions::names`.
using Names = std::map<std::string, std::string, std::less<>>;

/// Finds the experts of the layers `wanted`, in that order, or of every layer that has some.
/// A checkpoint may hold heads beside the model, with layer numbers of their own (Qwen3-Next's
/// "mtp." predicts further tokens): the model is the stack with the most layers.
/// @throws CheckpointError if a wanted layer has none, two tensors claim one place, or two stacks
///         are equally large; InvalidArgument if there are no experts at all, or a layer is
///         wanted twice.
[[nodiscard]] std::vector<LayerExperts> find_experts(const std::vector<SafetensorsFile>& files,
                                                     const std::vector<std::uint32_t>& wanted,
                                                     const Names& names);

/// "a, b, c and 4 more"
[[nodiscard]] std::string list_shortly(const std::vector<std::string>& names);

/// The files' names, shortly.
[[nodiscard]] std::string list_shortly(const std::vector<SafetensorsFile>& files);

/// The end of a message that something is missing: names `unread`, unless it is empty.
[[nodiscard]] std::string hint_at_unread(std::string_view unread);

}  // namespace spmoe
