#pragma once

#include <cstddef>
#include <cstdint>

#include "base/blob.hpp"
#include "compute/expert_ffn.hpp"

/// The arguments of one launch of the product kernel: plain numbers, passed by value.
namespace spmoe::cuda {

/// A block computes `tile_outputs` outputs, `chunk_inputs` inputs at a time.
inline constexpr std::uint32_t tile_outputs = 64;
inline constexpr std::uint32_t chunk_inputs = 256;
inline constexpr std::uint32_t block_threads = 256;
/// Rows that share one reading of the weights, in tiles of eight.
inline constexpr std::uint32_t tile_rows = 8;
inline constexpr std::uint32_t max_group_rows = 32;
/// A launch's arguments must stay below 4 KiB; its rows are bounded, and so is the scratch.
inline constexpr std::uint32_t max_groups = 24;
inline constexpr std::uint32_t max_launch_rows = 128;

/// Up to 32 rows of one expert.
struct RowGroup {
  const std::byte* blob;
  std::uint32_t row_count;
  std::uint32_t first_row;  ///< its place among the rows of the launch
  std::uint32_t out_rows[max_group_rows];
};

/// One of an expert's two matrices, and how its blocks share the work. How they do depends on the
/// shape alone, so that the order of every sum does.
struct Product {
  std::size_t weight_offset = 0;
  std::size_t bias_offset = 0;
  std::uint32_t inputs = 0;
  std::uint32_t outputs = 0;
  std::uint32_t chunk_count = 0;  ///< chunks of inputs
  std::uint32_t tile_count = 0;   ///< tiles of outputs
  std::uint32_t split_count = 0;  ///< blocks that share the inputs of a tile
  bool has_bias = false;
  bool gated = false;   ///< outputs are joined in pairs by the activation
  bool halves = false;  ///< gate is the first half and up the second; else they alternate
};

struct ProductLaunch {
  Product product;
  ActivationParams activation;
  const void* x;  ///< rows of `inputs` values of `x_dtype`
  DType x_dtype;
  std::uint32_t k;     ///< output row / k is the row of `x`, or 0: rows of `x` are of the launch
  bool aligned_x;      ///< rows of `x` may be read 16 bytes at a time
  bool aligned_blobs;  ///< and so may the weights
  float* partial;      ///< [rows of the launch, splits, tiles * tile_outputs]
  std::uint32_t* arrivals;  ///< [groups, tiles], all 0 between launches
  float* y;  ///< gated: [rows of the launch, outputs / 2]; else [output rows, outputs]
  RowGroup groups[max_groups];
};
static_assert(sizeof(ProductLaunch) <= 4096);

/// out[t] = sum over k of weights[t, k] * expert_out[t * k + place], in the order of k.
struct CombineLaunch {
  std::uint32_t tokens;
  std::uint32_t k;
  std::uint32_t hidden;
  const float* expert_out;
  const void* weights;
  DType weights_dtype;
  void* out;
  DType out_dtype;
};

}  // namespace spmoe::cuda
