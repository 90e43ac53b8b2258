#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "base/blob.hpp"
#include "store/safetensors.hpp"

namespace spmoe {

/// The part of an expert that a tensor holds, in the order in which a blob holds it.
enum class Part : std::uint8_t {
  gate,
  up,
  gate_up,
  down,
  gate_bias,
  up_bias,
  gate_up_bias,
  down_bias
};
inline constexpr std::size_t part_count = 8;

/// A way in which checkpoints name the tensors of experts.
struct Naming {
  struct Name {
    std::string_view suffix;  ///< follows the parent and, unless fused, the expert's number
    Part part;
    bool is_bias;
  };
  std::string_view parent;      ///< module that holds the tensors, such as "experts"
  std::span<const Name> names;  ///< in blob order
  bool fused;                   ///< one tensor holds a part of all experts of a layer
};

/// The content of an expert tensor's name: `<stack>layers.<layer>.<any>.<parent>.<suffix>`.
/// The views are into that name, and into static memory.
struct ExpertTensorName {
  std::string_view stack;  ///< what precedes "layers": "model." or, for an added head, "mtp."
  std::uint32_t layer;
  std::string_view prefix;  ///< up to and including the parent's dot
  std::uint32_t expert;     ///< 0 if fused
  const Naming* naming;     ///< null: experts' tensor, but none that spmoe reads
  Part part;
};

/// Reads the name of a tensor; none if it is not of a routed expert. Shared experts are not.
[[nodiscard]] std::optional<ExpertTensorName> parse_expert_tensor_name(std::string_view name);

/// A tensor and the file it rests in; empty if `tensor` is null.
struct PlacedTensor {
  const TensorInfo* tensor = nullptr;
  const SafetensorsFile* file = nullptr;
};

/// The tensors of one expert or, if fused, of all experts of a layer, by part.
class ExpertTensors {
 public:
  [[nodiscard]] PlacedTensor& operator[](Part part) {
    return placed_[static_cast<std::size_t>(part)];
  }
  [[nodiscard]] const PlacedTensor& operator[](Part part) const {
    return placed_[static_cast<std::size_t>(part)];
  }

 private:
  std::array<PlacedTensor, part_count> placed_{};
};

/// The format of a blob by its tensors' dtypes and shapes. Of fused tensors, the shapes alone
/// separate plain from transposed: gate_up [E, 2I, H] with down [E, H, I], or gate_up [E, H, 2I]
/// with down [E, I, H]; both at once would need 2I = H and H = I.
/// @param tensors complete for `naming` but for biases, all or none of which are there.
/// @param interleaved of the fused gate_up; separate gate and up are joined one after the other.
/// @throws CheckpointError if they fit no format.
[[nodiscard]] BlobFormat deduce_format(const ExpertTensors& tensors, const Naming& naming,
                                       bool interleaved);

/// Throws `CheckpointError`, naming the first of `tensors` whose dtype or shape is not what
/// `format` says; `reference` is the tensor that `format` was deduced from.
void check_format(const ExpertTensors& tensors, const Naming& naming, const BlobFormat& format,
                  std::uint64_t expert_count, const TensorInfo& reference);

}  // namespace spmoe
