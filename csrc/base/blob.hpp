#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace spmoe {

/// Element type of a checkpoint's expert weights.
enum class DType : std::uint8_t { f32, f16, bf16 };

[[nodiscard]] constexpr std::size_t size_of(DType dtype) noexcept {
  return dtype == DType::f32 ? 4 : 2;
}

/// "float32", "float16" or "bfloat16".
[[nodiscard]] constexpr std::string_view name_of(DType dtype) noexcept {
  switch (dtype) {
    case DType::f32: return "float32";
    case DType::f16: return "float16";
    case DType::bf16: return "bfloat16";
  }
  return "unknown";
}

/// How gate and up projections join: `act(gate) * up`, or gpt_oss's clamped
/// `(up + 1) * gate * sigmoid(alpha * gate)`.
enum class Activation : std::uint8_t { silu, gelu, gelu_tanh, clamped_swiglu };

/// The layout of one expert's bytes. A blob is contiguous and unpadded, in the order
/// gate_up, down, gate_up bias, down bias, each in the checkpoint's own dtype and layout:
///
/// | part         | plain                            | transposed    |
/// | gate_up      | [2 inter, hidden]                | [hidden, 2 inter] |
/// | down         | [hidden, inter]                  | [inter, hidden]   |
/// | gate_up bias | [2 inter], if `has_bias`         | same          |
/// | down bias    | [hidden], if `has_bias`          | same          |
///
/// Of the 2 inter outputs of gate_up, gate comes first and up second, or, if `interleaved`,
/// gate takes the even ones and up the odd ones.
struct BlobFormat {
  std::uint32_t hidden = 0;
  std::uint32_t inter = 0;
  DType dtype = DType::bf16;
  bool transposed = false;
  bool interleaved = false;
  bool has_bias = false;

  [[nodiscard]] constexpr std::size_t gate_up_bytes() const noexcept {
    return std::size_t{2} * inter * hidden * size_of(dtype);
  }
  [[nodiscard]] constexpr std::size_t down_bytes() const noexcept {
    return std::size_t{inter} * hidden * size_of(dtype);
  }
  [[nodiscard]] constexpr std::size_t gate_up_bias_bytes() const noexcept {
    return has_bias ? std::size_t{2} * inter * size_of(dtype) : 0;
  }
  [[nodiscard]] constexpr std::size_t down_bias_bytes() const noexcept {
    return has_bias ? std::size_t{hidden} * size_of(dtype) : 0;
  }
  [[nodiscard]] constexpr std::size_t down_offset() const noexcept { return gate_up_bytes(); }
  [[nodiscard]] constexpr std::size_t gate_up_bias_offset() const noexcept {
    return down_offset() + down_bytes();
  }
  [[nodiscard]] constexpr std::size_t down_bias_offset() const noexcept {
    return gate_up_bias_offset() + gate_up_bias_bytes();
  }
  /// Bytes of one blob.
  [[nodiscard]] constexpr std::size_t bytes() const noexcept {
    return down_bias_offset() + down_bias_bytes();
  }
  bool operator==(const BlobFormat&) const = default;
};

}  // namespace spmoe
