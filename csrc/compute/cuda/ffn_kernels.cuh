#pragma once

#include "compute/cuda/ffn_fragments.cuh"

/// The kernels. All sums run in an order that the shape alone decides.
namespace spmoe::cuda {

__device__ inline float activated(const ActivationParams& params, float gate, float up) {
  switch (params.kind) {
    case Activation::silu: return gate / (1.0F + expf(-gate)) * up;
    case Activation::gelu: {
      constexpr float sqrt_half = 0.707106781186547524F;
      return 0.5F * gate * (1.0F + erff(gate * sqrt_half)) * up;
    }
    case Activation::gelu_tanh: {
      constexpr float scale = 0.797884560802865356F;  // sqrt(2 / pi)
      return 0.5F * gate * (1.0F + tanhf(scale * (gate + 0.044715F * gate * gate * gate))) * up;
    }
    case Activation::clamped_swiglu: {
      // Comparisons that let NaN pass, as the host's do.
      gate = gate > params.limit ? params.limit : gate;
      up = up > params.limit ? params.limit : up;
      up = up < -params.limit ? -params.limit : up;
      return (up + 1.0F) * (gate * (1.0F / (1.0F + expf(-gate * params.alpha))));
    }
  }
  return 0;
}

/// Where row `row` of a group stands in `x`.
__device__ inline const std::byte* row_of(const ProductLaunch& args, const RowGroup& group,
                                          std::uint32_t row) {
  const std::uint32_t index = args.k == 0 ? group.first_row + row : group.out_rows[row] / args.k;
  const std::size_t size = args.x_dtype == DType::f32 ? 4 : 2;
  return static_cast<const std::byte*>(args.x) + std::size_t{index} * args.product.inputs * size;
}

template <DType kDtype, int kTerms>
__device__ inline void cut_eight(const ProductLaunch& args, const std::byte* from,
                                 std::uint32_t count, Quad (&terms)[kTerms]) {
  const Eight<kDtype> eight = args.aligned_x ? load_eight<kDtype, true>(from, count)
                                             : load_eight<kDtype, false>(from, count);
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    std::uint32_t cut[kTerms];
    if constexpr (kTerms == 1) {
      cut[0] = eight.data[0].words[pair];
    } else if constexpr (kDtype == DType::f32) {
      const Quad& quad = eight.data[pair / 2];
      cut_any_pair(float_of(quad.words[pair % 2 * 2]), float_of(quad.words[pair % 2 * 2 + 1]), cut);
    } else {
      const std::uint32_t word = eight.data[0].words[pair];
      if constexpr (kDtype == DType::f16) {
        cut_any_pair(f16_to_float(word & 0xFFFFU), f16_to_float(word >> 16), cut);
      } else {
        cut_any_pair(float_of(word << 16), float_of(word & 0xFFFF0000U), cut);
      }
    }
#pragma unroll
    for (int p = 0; p < kTerms; ++p) terms[p].words[pair] = cut[p];
  }
}

/// Eight inputs of a row, from `input` on, as terms; zeros past the last and for no row.
template <int kTerms>
__device__ inline void cut_inputs(const ProductLaunch& args, const RowGroup& group,
                                  std::uint32_t row, std::uint32_t input, Quad (&terms)[kTerms]) {
  const bool exists = row < group.row_count && input < args.product.inputs;
  const std::uint32_t count = exists ? at_most_eight(args.product.inputs - input) : 0;
  const std::byte* from = row_of(args, group, exists ? row : 0);
  if constexpr (kTerms == 1) {
    cut_eight<DType::bf16>(args, from + std::size_t{input} * 2, count, terms);
  } else {
    switch (args.x_dtype) {
      case DType::f32:
        cut_eight<DType::f32>(args, from + std::size_t{input} * 4, count, terms);
        break;
      case DType::f16:
        cut_eight<DType::f16>(args, from + std::size_t{input} * 2, count, terms);
        break;
      case DType::bf16:
        cut_eight<DType::bf16>(args, from + std::size_t{input} * 2, count, terms);
        break;
    }
  }
}

/// The sum over a tile's splits, bias included.
template <DType kDtype>
__device__ inline float total_of(const Product& product, const float* partial,
                                 const std::byte* blob, std::uint32_t tile, std::uint32_t local) {
  const std::size_t stride = std::size_t{product.tile_count} * tile_outputs;
  float total = 0;
#pragma unroll 8
  for (std::uint32_t split = 0; split < product.split_count; ++split) {
    total += load_shared_by_blocks(partial + split * stride + tile * tile_outputs + local);
  }
  if (!product.has_bias) return total;
  const std::size_t size = kDtype == DType::f32 ? 4 : 2;
  const std::uint32_t output = outputs_from(product, tile, local).first;
  return total + load_float<kDtype>(blob + product.bias_offset + output * size);
}

/// Joins the splits of a tile: into h = act(gate) * up, or into the rows of the output.
template <DType kDtype>
__device__ inline void finish_tile(const ProductLaunch& args, const RowGroup& group,
                                   std::uint32_t tile) {
  const Product& product = args.product;
  const std::uint32_t width = product.gated ? tile_outputs / 2 : tile_outputs;
  const std::uint32_t end = product.gated ? product.outputs / 2 : product.outputs;
  const std::size_t row_floats =
      std::size_t{product.split_count} * product.tile_count * tile_outputs;
  for (std::uint32_t item = threadIdx.x; item < group.row_count * width; item += block_threads) {
    const std::uint32_t row = item / width;
    const std::uint32_t local = item % width;
    const std::uint32_t output = tile * width + local;
    if (output >= end) continue;
    const float* partial = args.partial + (group.first_row + row) * row_floats;
    if (product.gated) {
      const std::uint32_t gate = product.halves ? local : 2 * local;
      const std::uint32_t up = product.halves ? width + local : gate + 1;
      args.y[std::size_t{group.first_row + row} * end + output] =
          activated(args.activation, total_of<kDtype>(product, partial, group.blob, tile, gate),
                    total_of<kDtype>(product, partial, group.blob, tile, up));
    } else {
      args.y[std::size_t{group.out_rows[row]} * end + output] =
          total_of<kDtype>(product, partial, group.blob, tile, local);
    }
  }
}

/// Blocks that must have room on a processor at once: as many as fit before registers spill, since
/// what they ask of the memory together is what keeps it busy.
template <DType kDtype, bool kTransposed, int kRowTiles>
constexpr unsigned resident_blocks() {
  if (kDtype == DType::f32 || kRowTiles > 1) return 1;
  return kDtype == DType::bf16 && !kTransposed ? 3 : 2;
}

/// Rows times one matrix of their experts. Block (tile, split, group) sums a share of the inputs
/// into `partial`; the last of a tile's blocks to end joins them.
///
/// A lane asks for all its weights of a chunk before it does anything else, 32 KiB a block in
/// bfloat16; while they come, the rows are cut into terms and laid out in shared memory the way
/// the lanes take them. Other blocks of the processor keep the memory busy meanwhile.
template <DType kDtype, bool kTransposed, int kRowTiles, int kTerms>
__global__ void __launch_bounds__(block_threads,
                                  (resident_blocks<kDtype, kTransposed, kRowTiles>()))
    multiply_rows(const __grid_constant__ ProductLaunch args) {
  using Weights = WarpWeights<kDtype, kTransposed>;
  constexpr int wterms = weight_terms<kDtype>;
  constexpr int steps_a_chunk = chunk_inputs / 32;
  constexpr int row_stride = tile_outputs + 4;  // apart in the banks
  constexpr int term_quads = kRowTiles * steps_a_chunk * 32;
  constexpr int sum_floats = Weights::input_parts * static_cast<int>(tile_rows) * row_stride;
  constexpr int quads = kTerms * term_quads > sum_floats / 4 ? kTerms * term_quads : sum_floats / 4;
  __shared__ Quad shared[quads];

  const Product& product = args.product;
  const RowGroup& group = args.groups[blockIdx.z];
  const std::uint32_t tile = blockIdx.x;
  const std::uint32_t split = blockIdx.y;
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const std::byte* matrix = group.blob + product.weight_offset;
  const int row_tiles = static_cast<int>((group.row_count + tile_rows - 1) / tile_rows);

  float total[Weights::output_tiles][kRowTiles][4] = {};
  const std::uint32_t chunks = product.chunk_count;
  const std::uint32_t last_chunk = chunks * (split + 1) / product.split_count;
  for (std::uint32_t chunk = chunks * split / product.split_count; chunk < last_chunk; ++chunk) {
    Weights weights;
    if (args.aligned_blobs) {
      weights.template load<true>(product, matrix, tile, chunk * chunk_inputs, warp, lane);
    } else {
      weights.template load<false>(product, matrix, tile, chunk * chunk_inputs, warp, lane);
    }

    sync_block();  // the chunk before has been read
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
      if (n >= row_tiles) break;
      const auto row =
          static_cast<std::uint32_t>(n) * tile_rows + static_cast<std::uint32_t>(lane) / 4;
      const std::uint32_t input = chunk * chunk_inputs + static_cast<std::uint32_t>(warp) * 32 +
                                  static_cast<std::uint32_t>(lane) % 4 * 8;
      Quad terms[kTerms];
      cut_inputs(args, group, row, input, terms);
#pragma unroll
      for (int p = 0; p < kTerms; ++p) {
        shared[p * term_quads + (n * steps_a_chunk + warp) * 32 + lane] = terms[p];
      }
    }
    sync_block();

#pragma unroll
    for (int m = 0; m < Weights::output_tiles; ++m) {
#pragma unroll
      for (int step = 0; step < Weights::steps; ++step) {
        std::uint32_t a[2][wterms][4];
        weights.fragment(step, 0, m, a[0]);
        weights.fragment(step, 1, m, a[1]);
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
          if (n >= row_tiles) break;
          // Tensor cores cut off what they do not keep. So their sums are kept short, the small
          // terms have one of their own, and the long sums are rounded.
          float heads[4] = {};
          float rests[4] = {};
#pragma unroll
          for (int p = 0; p < kTerms; ++p) {
            const Quad b =
                shared[p * term_quads +
                       (n * steps_a_chunk + Weights::first_step(warp) + step) * 32 + lane];
#pragma unroll
            for (int q = 0; q < wterms; ++q) {
              if (p + q > 3) continue;  // below what fp32 keeps
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                multiply_add(p + q == 0 ? heads : rests, a[half][q], b.words[2 * half],
                             b.words[2 * half + 1]);
              }
            }
          }
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            total[m][n][c] += kTerms * wterms == 1 ? heads[c] : heads[c] + rests[c];
          }
        }
      }
    }
  }

  // Warps that share an output meet in shared memory, eight rows at a time.
  auto* sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int n = 0; n < kRowTiles; ++n) {
    if (n >= row_tiles) break;
    sync_block();
    const int part = Weights::first_step(warp) / Weights::steps;
#pragma unroll
    for (int m = 0; m < Weights::output_tiles; ++m) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int column = lane % 4 * 2 + c % 2;
        sums[(part * static_cast<int>(tile_rows) + column) * row_stride +
             Weights::local_output(warp, lane, m, c)] = total[m][n][c];
      }
    }
    sync_block();
    for (std::uint32_t item = threadIdx.x; item < tile_rows * tile_outputs; item += block_threads) {
      const std::uint32_t column = item / tile_outputs;
      const std::uint32_t row = static_cast<std::uint32_t>(n) * tile_rows + column;
      if (row >= group.row_count) continue;
      float sum = 0;
#pragma unroll
      for (std::uint32_t p = 0; p < Weights::input_parts; ++p) {
        sum += sums[(p * tile_rows + column) * row_stride + item % tile_outputs];
      }
      const std::size_t place =
          (std::size_t{group.first_row + row} * product.split_count + split) * product.tile_count +
          tile;
      args.partial[place * tile_outputs + item % tile_outputs] = sum;
    }
  }

  publish();
  sync_block();
  bool is_last = false;
  if (threadIdx.x == 0) {
    std::uint32_t* arrivals = args.arrivals + blockIdx.z * product.tile_count + tile;
    is_last = arrive(arrivals) + 1 == product.split_count;
    if (is_last) *arrivals = 0;  // for the next launch
  }
  if (any_of_block(is_last)) {
    publish();
    finish_tile<kDtype>(args, group, tile);
  }
}

/// Block (token, part of hidden) sums a token's experts, in fp32, and narrows the sum.
__global__ void __launch_bounds__(block_threads)
    combine_rows(const __grid_constant__ CombineLaunch args) {
  const std::uint32_t token = blockIdx.x;
  const std::uint32_t h = blockIdx.y * block_threads + threadIdx.x;
  if (h >= args.hidden) return;
  const std::size_t weight_size = args.weights_dtype == DType::f32 ? 4 : 2;
  const auto* weights = static_cast<const std::byte*>(args.weights);
  float sum = 0;
  for (std::uint32_t place = 0; place < args.k; ++place) {
    const std::size_t row = std::size_t{token} * args.k + place;
    const float weight = load_float(weights + row * weight_size, args.weights_dtype);
    sum += weight * args.expert_out[row * args.hidden + h];
  }
  const std::size_t at = std::size_t{token} * args.hidden + h;
  switch (args.out_dtype) {
    case DType::f32: static_cast<float*>(args.out)[at] = sum; break;
    case DType::f16: static_cast<std::uint16_t*>(args.out)[at] = float_to_f16(sum); break;
    case DType::bf16: static_cast<std::uint16_t*>(args.out)[at] = float_to_bf16(sum); break;
  }
}

}  // namespace spmoe::cuda
