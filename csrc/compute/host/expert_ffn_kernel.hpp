#pragma once

#include <cstddef>

#include "compute/host/host_kernel.hpp"

/// The linear kernels, written once over a vector type `V` of one instruction set.
///
/// Included only by `expert_ffn_<isa>.cpp`, where `V` lives in an unnamed namespace: then every
/// instance has internal linkage, and the linker cannot hand AVX code to another file. For the
/// same reason every function here is a template over `V` or a local lambda, and no std template is
/// used.
///
/// `V` gives: `Vec`; `lanes`; `max_rows`; `outs(rows)`, the outputs that share the registers with
/// `rows` rows, a divisor of `panel_outputs`; `zero`, `broadcast(float)`, `fma(a, b, c)`,
/// `sum(Vec)`; `load(F)` and `load_part(F, count)` from fp32, `store` and `store_part` to it; and
/// `load(W, p)`, `load_part(W, p, count)`, which widen weights of any alignment. Parts are zero
/// past `count`.
///
/// One vector accumulates one (row, output) pair over the inputs, in order, in every blocking.
namespace spmoe::kernel {

struct F32 {
  static constexpr std::size_t bytes = 4;
};
struct F16 {
  static constexpr std::size_t bytes = 2;
};
struct BF16 {
  static constexpr std::size_t bytes = 2;
};

/// Weight rows that stay in cache while blocks of rows pass over them.
inline constexpr std::size_t panel_outputs = 24;
/// Inputs per pass over a transposed matrix; between passes the accumulators rest in `y`.
inline constexpr std::size_t pass_inputs = 16;

/// Calls `body.operator()<n>()` for the n of [1, kMax] that equals `count`.
template <std::size_t kMax, class Body>
void with_constant(std::size_t count, const Body& body) noexcept {
  if constexpr (kMax > 1) {
    if (count < kMax) return with_constant<kMax - 1>(count, body);
  }
  body.template operator()<kMax>();
}

/// Cuts the rows into even blocks of at most `V::max_rows` and calls `body.operator()<n>(row)`.
template <class V, class Body>
void for_row_blocks(std::size_t rows, const Body& body) noexcept {
  for (std::size_t row = 0; row < rows;) {
    const std::size_t left = rows - row;
    const std::size_t blocks = (left + V::max_rows - 1) / V::max_rows;
    const std::size_t count = (left + blocks - 1) / blocks;
    with_constant<V::max_rows>(count,
                               [&]<std::size_t kRows> { body.template operator()<kRows>(row); });
    row += count;
  }
}

/// sums[r][o] += w(o) * x(r). Holds the shorter side in registers and streams the longer one.
template <class V, std::size_t kRows, std::size_t kOuts, class Weight, class Input>
void accumulate(typename V::Vec (&sums)[kRows][kOuts], const Weight& weight,
                const Input& input) noexcept {
  if constexpr (kRows <= kOuts) {
    typename V::Vec x[kRows];
#pragma GCC unroll 8
    for (std::size_t r = 0; r < kRows; ++r) x[r] = input(r);
#pragma GCC unroll 8
    for (std::size_t o = 0; o < kOuts; ++o) {
      const typename V::Vec w = weight(o);
#pragma GCC unroll 8
      for (std::size_t r = 0; r < kRows; ++r) sums[r][o] = V::fma(w, x[r], sums[r][o]);
    }
  } else {
    typename V::Vec w[kOuts];
#pragma GCC unroll 8
    for (std::size_t o = 0; o < kOuts; ++o) w[o] = weight(o);
#pragma GCC unroll 8
    for (std::size_t r = 0; r < kRows; ++r) {
      const typename V::Vec x = input(r);
#pragma GCC unroll 8
      for (std::size_t o = 0; o < kOuts; ++o) sums[r][o] = V::fma(w[o], x, sums[r][o]);
    }
  }
}

/// Bytes to fetch ahead of each weight row of a tile. Where rows are short that is the next tile's
/// row, since the processor's own prefetcher starts again with each.
template <class V>
constexpr std::size_t prefetch_distance(std::size_t row_bytes, std::size_t outs) noexcept {
  return row_bytes > 4096 ? 1024 : outs * row_bytes;
}

template <class V, class W, std::size_t kRows, std::size_t kOuts>
void plain_tile(const LinearBlock& block, std::size_t row, std::size_t out) noexcept {
  typename V::Vec sums[kRows][kOuts];
  const float* x[kRows];
  const std::byte* weight[kOuts];
  const std::size_t ahead = prefetch_distance<V>(block.inputs * W::bytes, kOuts);
#pragma GCC unroll 8
  for (std::size_t r = 0; r < kRows; ++r) {
    x[r] = block.x[row + r];
#pragma GCC unroll 8
    for (std::size_t o = 0; o < kOuts; ++o) sums[r][o] = V::zero();
  }
#pragma GCC unroll 8
  for (std::size_t o = 0; o < kOuts; ++o) {
    weight[o] = block.weight + (out + o) * block.inputs * W::bytes;
  }
  std::size_t i = 0;
  for (; i + V::lanes <= block.inputs; i += V::lanes) {
    accumulate<V>(
        sums,
        [&](std::size_t o) {
          // One row leaves the processor time enough to fetch by itself.
          if constexpr (kRows > 1) __builtin_prefetch(weight[o] + i * W::bytes + ahead);
          return V::load(W{}, weight[o] + i * W::bytes);
        },
        [&](std::size_t r) { return V::load(x[r] + i); });
  }
  if (const std::size_t left = block.inputs - i; left != 0) {
    accumulate<V>(
        sums, [&](std::size_t o) { return V::load_part(W{}, weight[o] + i * W::bytes, left); },
        [&](std::size_t r) { return V::load_part(x[r] + i, left); });
  }
#pragma GCC unroll 8
  for (std::size_t r = 0; r < kRows; ++r) {
    float* y = block.y[row + r] + (out - block.first);
#pragma GCC unroll 8
    for (std::size_t o = 0; o < kOuts; ++o) y[o] = V::sum(sums[r][o]);
  }
}

template <class V, class W>
void linear_plain(const LinearBlock& block) noexcept {
  for (std::size_t panel = block.first; panel < block.last; panel += panel_outputs) {
    const std::size_t end = panel + panel_outputs < block.last ? panel + panel_outputs : block.last;
    for_row_blocks<V>(block.rows, [&]<std::size_t kRows>(std::size_t row) {
      constexpr std::size_t outs = V::outs(kRows);
      static_assert(panel_outputs % outs == 0);
      std::size_t out = panel;
      for (; out + outs <= end; out += outs) plain_tile<V, W, kRows, outs>(block, row, out);
      for (; out < end; ++out) plain_tile<V, W, kRows, 1>(block, row, out);
    });
  }
}

/// Adds inputs [begin, end) to `kVecs` vectors of outputs; the last vector holds `part` of them.
template <class V, class W, std::size_t kRows, std::size_t kVecs, bool kPart>
void transposed_tile(const LinearBlock& block, std::size_t row, std::size_t out, std::size_t begin,
                     std::size_t end, std::size_t part) noexcept {
  typename V::Vec sums[kRows][kVecs];
  const float* x[kRows];
  float* y[kRows];
#pragma GCC unroll 8
  for (std::size_t r = 0; r < kRows; ++r) {
    x[r] = block.x[row + r];
    y[r] = block.y[row + r] + (out - block.first);
#pragma GCC unroll 8
    for (std::size_t v = 0; v < kVecs; ++v) {
      if (begin == 0) {
        sums[r][v] = V::zero();
      } else if constexpr (kPart) {
        sums[r][v] = V::load_part(y[r] + v * V::lanes, part);
      } else {
        sums[r][v] = V::load(y[r] + v * V::lanes);
      }
    }
  }
  const std::size_t stride = block.outputs * W::bytes;
  const std::byte* weight = block.weight + begin * stride + out * W::bytes;
  const std::size_t ahead = end + pass_inputs <= block.inputs ? pass_inputs * stride : 0;
  for (std::size_t i = begin; i < end; ++i, weight += stride) {
    accumulate<V>(
        sums,
        [&](std::size_t v) {
          const std::byte* from = weight + v * V::lanes * W::bytes;
          __builtin_prefetch(from + ahead);
          if constexpr (kPart) {
            return V::load_part(W{}, from, part);
          } else {
            return V::load(W{}, from);
          }
        },
        [&](std::size_t r) { return V::broadcast(x[r][i]); });
  }
#pragma GCC unroll 8
  for (std::size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (std::size_t v = 0; v < kVecs; ++v) {
      if constexpr (kPart) {
        V::store_part(y[r] + v * V::lanes, sums[r][v], part);
      } else {
        V::store(y[r] + v * V::lanes, sums[r][v]);
      }
    }
  }
}

template <class V, class W>
void linear_transposed(const LinearBlock& block) noexcept {
  for (std::size_t begin = 0; begin < block.inputs; begin += pass_inputs) {
    const std::size_t end = begin + pass_inputs < block.inputs ? begin + pass_inputs : block.inputs;
    for_row_blocks<V>(block.rows, [&]<std::size_t kRows>(std::size_t row) {
      constexpr std::size_t vecs = V::outs(kRows);
      std::size_t out = block.first;
      for (; out + vecs * V::lanes <= block.last; out += vecs * V::lanes) {
        transposed_tile<V, W, kRows, vecs, false>(block, row, out, begin, end, 0);
      }
      for (; out + V::lanes <= block.last; out += V::lanes) {
        transposed_tile<V, W, kRows, 1, false>(block, row, out, begin, end, 0);
      }
      if (out < block.last) {
        transposed_tile<V, W, kRows, 1, true>(block, row, out, begin, end, block.last - out);
      }
    });
  }
}

template <class V>
constexpr LinearTable make_linear_table() noexcept {
  static_assert(static_cast<int>(DType::f32) == 0 && static_cast<int>(DType::f16) == 1 &&
                static_cast<int>(DType::bf16) == 2);
  return {
      .plain = {linear_plain<V, F32>, linear_plain<V, F16>, linear_plain<V, BF16>},
      .transposed = {linear_transposed<V, F32>, linear_transposed<V, F16>,
                     linear_transposed<V, BF16>},
  };
}

}  // namespace spmoe::kernel
