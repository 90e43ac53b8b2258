#pragma once

#include <cstddef>
#include <span>
#include <string_view>

#include "base/blob.hpp"

namespace spmoe {

/// Outputs [first, last) of one matrix, for a few rows of input.
struct LinearBlock {
  const std::byte* weight;  ///< the whole matrix, any alignment
  std::size_t inputs;
  std::size_t outputs;    ///< of the whole matrix: the stride of a transposed one
  std::size_t first;      ///< first output to compute
  std::size_t last;       ///< one past the last
  const float* const* x;  ///< per row, `inputs` floats
  float* const* y;        ///< per row, receives output `first` at index 0; apart from `x`
  std::size_t rows;
};

/// y = weight . x, fp32 accumulation. An output's bits depend on its weights and its row of `x`
/// alone: its sum runs over the inputs in one order whatever the block around it.
using LinearFn = void (*)(const LinearBlock&) noexcept;

/// The linear kernels of one instruction set, by dtype, plain ([outputs, inputs]) and transposed.
struct LinearTable {
  LinearFn plain[3];
  LinearFn transposed[3];

  [[nodiscard]] constexpr LinearFn get(DType dtype, bool is_transposed) const noexcept {
    return (is_transposed ? transposed : plain)[static_cast<std::size_t>(dtype)];
  }
};

/// One instruction set that this build holds kernels for.
struct HostKernel {
  std::string_view name;
  bool (*supported)() noexcept;  ///< by this processor and its operating system
  const LinearTable* linear;
};

/// Every instruction set of this build, fastest first; the last one runs everywhere.
/// Defined once per architecture: the build picks `host_kernels_<architecture>.cpp`.
[[nodiscard]] std::span<const HostKernel> host_kernels() noexcept;

extern const LinearTable baseline_linear;
extern const LinearTable avx2_linear;    ///< x86 builds only
extern const LinearTable avx512_linear;  ///< x86 builds only

}  // namespace spmoe
