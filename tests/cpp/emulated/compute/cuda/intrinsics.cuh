#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <span>
#include <utility>
#include <vector>

#include "base/convert.hpp"
#include "block.hpp"
#include "compute/cuda/ffn_launch.hpp"
#include "device/cuda/handle.hpp"
#include "fake_cuda.hpp"

/// Stands in for csrc/compute/cuda/intrinsics.cuh: the same functions, on the host.

#define __device__
#define __global__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define threadIdx (::spmoe::emulated::thread_index())
#define blockIdx (::spmoe::emulated::block_index())

namespace spmoe::cuda {

using dim3 = emulated::Index;

struct alignas(16) Quad {
  std::uint32_t words[4];
};

inline Quad load_streaming(const void* from) {
  if (reinterpret_cast<std::uintptr_t>(from) % sizeof(Quad) != 0) std::abort();
  Quad quad;
  std::memcpy(&quad, from, sizeof quad);
  return quad;
}

inline float load_shared_by_blocks(const float* from) { return *from; }

namespace emulation {

/// `value` in fp32, cut off towards zero.
inline float cut_off(double value) {
  const auto nearest = static_cast<float>(value);
  const bool beyond = std::abs(static_cast<double>(nearest)) > std::abs(value);
  return beyond ? std::bit_cast<float>(std::bit_cast<std::uint32_t>(nearest) - 1) : nearest;
}

/// The products of two pairs of bfloat16 numbers, summed.
inline double dot(std::uint32_t a, std::uint32_t b) {
  const auto low = [](std::uint32_t word) {
    return static_cast<double>(std::bit_cast<float>(word << 16));
  };
  const auto high = [](std::uint32_t word) {
    return static_cast<double>(std::bit_cast<float>(word & 0xFFFF0000U));
  };
  return low(a) * low(b) + high(a) * high(b);
}

/// Whether the products are zeros for certain, as most are where rows are padded.
inline bool is_zero(std::uint32_t a, std::uint32_t b) {
  constexpr std::uint32_t low_exponent = 0x7F80U;
  constexpr std::uint32_t high_exponent = low_exponent << 16;
  return (b & 0x7FFF7FFFU) == 0 && (a & low_exponent) != low_exponent &&
         (a & high_exponent) != high_exponent;
}

}  // namespace emulation

/// Sums of eight products, each cut off as it joins the sum: tensor cores round no better.
inline void multiply_add(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                         std::uint32_t b1) {
  const emulated::Operands* lanes =
      emulated::exchange_in_warp({{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const unsigned lane = threadIdx.x % 32;
  for (unsigned c = 0; c < 4; ++c) {
    const unsigned row = lane / 4;  // and eight on, in the words of odd index
    const unsigned column = lane % 4 * 2 + c % 2;
    for (unsigned part = 0; part < 2; ++part) {
      double sum = 0;
      for (unsigned t = 0; t < 4; ++t) {
        const std::uint32_t a_word = lanes[row * 4 + t].a[part * 2 + c / 2];
        const std::uint32_t b_word = lanes[column * 4 + t].b[part];
        if (!emulation::is_zero(a_word, b_word)) sum += emulation::dot(a_word, b_word);
      }
      if (sum != 0) d[c] = emulation::cut_off(static_cast<double>(d[c]) + sum);
    }
  }
}

inline std::uint32_t low_halves(std::uint32_t first, std::uint32_t second) {
  return (first & 0xFFFFU) | (second << 16);
}
inline std::uint32_t high_halves(std::uint32_t first, std::uint32_t second) {
  return (first >> 16) | (second & 0xFFFF0000U);
}

inline std::uint32_t bits_of(float value) { return std::bit_cast<std::uint32_t>(value); }
inline float float_of(std::uint32_t bits) { return std::bit_cast<float>(bits); }

inline float f16_to_float(std::uint32_t bits) {
  return spmoe::f16_to_float(static_cast<std::uint16_t>(bits));
}
using spmoe::float_to_bf16;
using spmoe::float_to_f16;

inline void sync_block() { static_cast<void>(emulated::any_of_block(false)); }
inline bool any_of_block(bool value) { return emulated::any_of_block(value); }
inline void publish() {}
inline std::uint32_t arrive(std::uint32_t* counter) { return (*counter)++; }

/// Where a launch reads and writes: a byte of each region stands for all of it, but of weights all
/// that is certain, for an expert arrives in several copies.
struct Accesses {
  std::vector<std::span<const std::byte>> reads, writes;
};
inline Accesses accesses(const ProductLaunch& args, unsigned group_count) {
  const auto bytes = [](const auto* data) {
    return std::span{reinterpret_cast<const std::byte*>(data), 1};
  };
  Accesses touched{{bytes(static_cast<const std::byte*>(args.x))},
                   {bytes(args.partial), bytes(args.y)}};
  constexpr std::size_t least_weight_bytes = 2;
  const std::size_t weights = std::size_t{args.product.inputs} * args.product.outputs;
  for (unsigned group = 0; group < group_count; ++group) {
    touched.reads.emplace_back(args.groups[group].blob + args.product.weight_offset,
                               weights * least_weight_bytes);
  }
  return touched;
}
inline Accesses accesses(const CombineLaunch& args, unsigned) {
  return {{std::span{reinterpret_cast<const std::byte*>(args.expert_out), 1}},
          {std::span{static_cast<const std::byte*>(args.out), 1}}};
}

/// On the null stream the kernel has run at the return; on others it is the fake runtime's.
template <class Args>
void launch(void (*kernel)(Args), dim3 grid, unsigned threads, std::uintptr_t stream,
            const Args& args) {
  const auto run = [=] { emulated::run_grid(grid, threads, [&] { kernel(args); }); };
  if (stream == 0) return run();
  Accesses touched = accesses(args, grid.z);
  check(fake_cuda::launch(reinterpret_cast<cudaStream_t>(stream), std::move(touched.reads), run,
                          std::move(touched.writes)),
        "launch of a kernel of experts");
}

}  // namespace spmoe::cuda
