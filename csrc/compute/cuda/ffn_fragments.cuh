#pragma once

#include "compute/cuda/ffn_launch.hpp"
#include "compute/cuda/intrinsics.cuh"

/// Weights and rows in the registers of a warp, as terms that tensor cores take.
///
/// A number is cut into bfloat16 terms that sum to it exactly: one for bfloat16, two for float16,
/// three for float32. Products of terms are exact in fp32, so that nothing is rounded but the
/// sums. Weights must be finite: an infinite one may give NaN.
namespace spmoe::cuda {

/// Eight consecutive numbers as they lie in memory.
template <DType kDtype>
struct Eight {
  static constexpr int quads = kDtype == DType::f32 ? 2 : 1;
  Quad data[quads];
};

/// Terms that a weight is cut into.
template <DType kDtype>
inline constexpr int weight_terms = 3;
template <>
inline constexpr int weight_terms<DType::f16> = 2;
template <>
inline constexpr int weight_terms<DType::bf16> = 1;

/// One number at an address of any alignment, as its bits.
template <DType kDtype>
__device__ inline std::uint32_t load_bits(const std::byte* from) {
  std::uint32_t bits = 0;
  for (int i = 0; i < (kDtype == DType::f32 ? 4 : 2); ++i) {
    bits |= static_cast<std::uint32_t>(from[i]) << (8 * i);
  }
  return bits;
}

template <DType kDtype>
__device__ inline float load_float(const std::byte* from) {
  const std::uint32_t bits = load_bits<kDtype>(from);
  if constexpr (kDtype == DType::f32) return float_of(bits);
  if constexpr (kDtype == DType::bf16) return float_of(bits << 16);
  return f16_to_float(bits);
}

__device__ inline float load_float(const std::byte* from, DType dtype) {
  switch (dtype) {
    case DType::f32: return load_float<DType::f32>(from);
    case DType::f16: return load_float<DType::f16>(from);
    case DType::bf16: return load_float<DType::bf16>(from);
  }
  return 0;
}

/// The first `count` of eight numbers, and zeros. If `kAligned`, `count` is 0 or 8.
template <DType kDtype, bool kAligned>
__device__ inline Eight<kDtype> load_eight(const std::byte* from, std::uint32_t count) {
  Eight<kDtype> eight{};
  if constexpr (kAligned) {
    if (count != 0) {
#pragma unroll
      for (int q = 0; q < Eight<kDtype>::quads; ++q) {
        eight.data[q] = load_streaming(from + q * static_cast<int>(sizeof(Quad)));
      }
    }
  } else {
    constexpr std::uint32_t in_word = kDtype == DType::f32 ? 1 : 2;
    constexpr std::uint32_t bytes = 4 / in_word;
#pragma unroll
    for (std::uint32_t i = 0; i < 8; ++i) {
      if (i < count) {
        eight.data[i / in_word / 4].words[i / in_word % 4] |= load_bits<kDtype>(from + i * bytes)
                                                              << (8 * bytes * (i % in_word));
      }
    }
  }
  return eight;
}

/// The leading bits of `value`, those that bfloat16 holds.
__device__ inline float head_of(float value) { return float_of(bits_of(value) & 0xFFFF0000U); }

/// Cuts two finite floats into terms; each word holds one of both, that of `first` below.
template <int kTerms>
__device__ inline void cut_pair(float first, float second, std::uint32_t (&terms)[kTerms]) {
#pragma unroll
  for (int p = 0; p < kTerms; ++p) {
    terms[p] = high_halves(bits_of(first), bits_of(second));
    first -= head_of(first);
    second -= head_of(second);
  }
}

/// The same for floats of any kind: infinity and NaN are their own first term, and the rest is 0.
template <int kTerms>
__device__ inline void cut_any_pair(float first, float second, std::uint32_t (&terms)[kTerms]) {
  constexpr std::uint32_t quiet_nan = 0x7FC00000U;
  const auto is_finite = [](float value) { return (bits_of(value) & 0x7F800000U) != 0x7F800000U; };
  const auto whole = [](float value) { return value == value ? value : float_of(quiet_nan); };
  const bool first_finite = is_finite(first);
  const bool second_finite = is_finite(second);
  const std::uint32_t specials = high_halves(bits_of(first_finite ? 0.0F : whole(first)),
                                             bits_of(second_finite ? 0.0F : whole(second)));
  cut_pair(first_finite ? first : 0.0F, second_finite ? second : 0.0F, terms);
  terms[0] |= specials;
}

/// Numbers 2 * pair and 2 * pair + 1 of eight, as terms.
template <DType kDtype>
__device__ inline void cut_pair_of(const Eight<kDtype>& eight, int pair,
                                   std::uint32_t (&terms)[weight_terms<kDtype>]) {
  if constexpr (kDtype == DType::bf16) {
    terms[0] = eight.data[0].words[pair];
  } else if constexpr (kDtype == DType::f16) {
    const std::uint32_t word = eight.data[0].words[pair];
    cut_pair(f16_to_float(word & 0xFFFFU), f16_to_float(word >> 16), terms);
  } else {
    const Quad& quad = eight.data[pair / 2];
    cut_pair(float_of(quad.words[pair % 2 * 2]), float_of(quad.words[pair % 2 * 2 + 1]), terms);
  }
}

/// Which outputs a tile computes: `first` and those behind it, `count` of them.
struct Outputs {
  std::uint32_t first;
  std::uint32_t count;
};

/// From output `local` of a tile on. Of two halves, a tile takes 32 of either.
__device__ inline Outputs outputs_from(const Product& product, std::uint32_t tile,
                                       std::uint32_t local) {
  const std::uint32_t width = product.halves ? tile_outputs / 2 : tile_outputs;
  const std::uint32_t end = product.halves ? product.outputs / 2 : product.outputs;
  const std::uint32_t at = tile * width + local % width;
  return {local / width * end + at, at < end ? end - at : 0};
}

__device__ inline std::uint32_t at_most_eight(std::uint32_t count) { return count < 8 ? count : 8; }

/// The weights of a warp for one chunk, and where they stand. A step is 32 inputs, of which lane
/// 4 g + t holds those from 8 t on, in two halves of 16 as `multiply_add` takes them.
///
/// Plain: of the eight warps, four share the tile's outputs and two the chunk's inputs; a warp
/// holds outputs g and g + 8 of its sixteen over four steps. Transposed: the warps share the
/// inputs; a warp holds all outputs, a lane those from 8 g on, over one step.
template <DType kDtype, bool kTransposed>
struct WarpWeights {
  static constexpr int steps = kTransposed ? 1 : 4;
  static constexpr int output_tiles = kTransposed ? 4 : 1;  ///< of sixteen
  static constexpr int input_parts = kTransposed ? 8 : 2;   ///< of a chunk, one a warp

  Eight<kDtype> data[8];

  /// The first of the chunk's eight steps that `warp` takes.
  __device__ static int first_step(int warp) { return kTransposed ? warp : warp / 4 * steps; }

  /// The output within the tile whose sum is word `c` (0 to 3) of `output_tile`'s result.
  __device__ static int local_output(int warp, int lane, int output_tile, int c) {
    return kTransposed ? lane / 4 * 8 + output_tile * 2 + c / 2
                       : warp % 4 * 16 + lane / 4 + c / 2 * 8;
  }

  /// Takes the tile's weights of the chunk at `first_input`.
  template <bool kAligned>
  __device__ void load(const Product& product, const std::byte* matrix, std::uint32_t tile,
                       std::uint32_t first_input, int warp, int lane) {
    constexpr std::size_t size = kDtype == DType::f32 ? 4 : 2;
    const std::uint32_t input = first_input + static_cast<std::uint32_t>(first_step(warp)) * 32 +
                                static_cast<std::uint32_t>(lane) % 4 * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const auto n = static_cast<std::uint32_t>(i);
      const auto local = static_cast<std::uint32_t>(local_output(warp, lane, 0, i % 2 * 2));
      if constexpr (kTransposed) {
        const Outputs outputs =
            outputs_from(product, tile, static_cast<std::uint32_t>(lane) / 4 * 8);
        const std::uint32_t count = input + n < product.inputs ? at_most_eight(outputs.count) : 0;
        const std::size_t at = std::size_t{input + n} * product.outputs + outputs.first;
        data[i] = load_eight<kDtype, kAligned>(matrix + at * size, count);
      } else {
        const Outputs outputs = outputs_from(product, tile, local);
        const std::uint32_t from = input + n / 2 * 32;
        const std::uint32_t count =
            outputs.count != 0 && from < product.inputs ? at_most_eight(product.inputs - from) : 0;
        const std::size_t at = std::size_t{outputs.first} * product.inputs + from;
        data[i] = load_eight<kDtype, kAligned>(matrix + at * size, count);
      }
    }
  }

  /// The matrix that `multiply_add` takes, a term at a time, of one half of a step.
  __device__ void fragment(int step, int half, int output_tile,
                           std::uint32_t (&a)[weight_terms<kDtype>][4]) const {
    constexpr int terms = weight_terms<kDtype>;
    if constexpr (kTransposed) {
#pragma unroll
      for (int columns = 0; columns < 2; ++columns) {
        std::uint32_t even[terms];
        std::uint32_t odd[terms];
        cut_pair_of<kDtype>(data[half * 4 + columns * 2], output_tile, even);
        cut_pair_of<kDtype>(data[half * 4 + columns * 2 + 1], output_tile, odd);
#pragma unroll
        for (int p = 0; p < terms; ++p) {
          a[p][columns * 2] = low_halves(even[p], odd[p]);
          a[p][columns * 2 + 1] = high_halves(even[p], odd[p]);
        }
      }
    } else {
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        std::uint32_t pair[terms];
        cut_pair_of<kDtype>(data[step * 2 + word % 2], half * 2 + word / 2, pair);
#pragma unroll
        for (int p = 0; p < terms; ++p) a[p][word] = pair[p];
      }
    }
  }
};

}  // namespace spmoe::cuda
