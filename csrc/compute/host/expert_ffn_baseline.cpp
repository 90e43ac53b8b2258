#include <cstdint>

#include "base/convert.hpp"
#include "compute/host/expert_ffn_kernel.hpp"

namespace spmoe {
namespace {

using kernel::BF16;
using kernel::F16;
using kernel::F32;

// Four lanes of the compiler's own vectors: SSE2 on x86-64, NEON on AArch64.
struct Baseline {
  using Vec = float __attribute__((vector_size(16)));
  static constexpr std::size_t lanes = 4;
  static constexpr std::size_t max_rows = 4;
  static constexpr std::size_t outs(std::size_t rows) {
    constexpr std::size_t by_rows[] = {8, 6, 4, 3};
    return by_rows[rows - 1];
  }

  static float widen(F16, std::uint16_t bits) noexcept { return f16_to_float(bits); }
  static float widen(BF16, std::uint16_t bits) noexcept { return bf16_to_float(bits); }

  static Vec zero() noexcept { return Vec{}; }
  static Vec broadcast(float value) noexcept { return Vec{value, value, value, value}; }
  // Two roundings: this file is compiled with -ffp-contract=off, so that every blocking agrees.
  static Vec fma(Vec a, Vec b, Vec c) noexcept { return a * b + c; }
  static float sum(Vec v) noexcept { return (v[0] + v[2]) + (v[1] + v[3]); }

  static Vec load(const float* from) noexcept { return load_part(from, lanes); }
  static Vec load_part(const float* from, std::size_t count) noexcept {
    Vec v{};
    __builtin_memcpy(&v, from, count * sizeof(float));
    return v;
  }
  static void store(float* to, Vec v) noexcept { store_part(to, v, lanes); }
  static void store_part(float* to, Vec v, std::size_t count) noexcept {
    __builtin_memcpy(to, &v, count * sizeof(float));
  }
  template <class W>
  static Vec load(W dtype, const std::byte* from) noexcept {
    return load_part(dtype, from, lanes);
  }
  static Vec load_part(F32, const std::byte* from, std::size_t count) noexcept {
    Vec v{};
    __builtin_memcpy(&v, from, count * sizeof(float));
    return v;
  }
  template <class Half>
  static Vec load_part(Half half, const std::byte* from, std::size_t count) noexcept {
    std::uint16_t bits[lanes] = {};
    __builtin_memcpy(bits, from, count * sizeof(std::uint16_t));
    return Vec{widen(half, bits[0]), widen(half, bits[1]), widen(half, bits[2]),
               widen(half, bits[3])};
  }
};

}  // namespace

constinit const LinearTable baseline_linear = kernel::make_linear_table<Baseline>();

}  // namespace spmoe
