#include <immintrin.h>

#include "compute/host/expert_ffn_kernel.hpp"

namespace spmoe {
namespace {

using kernel::BF16;
using kernel::F16;
using kernel::F32;

struct Avx2 {
  using Vec = __m256;
  static constexpr std::size_t lanes = 8;
  static constexpr std::size_t max_rows = 4;
  static constexpr std::size_t outs(std::size_t rows) {
    constexpr std::size_t by_rows[] = {8, 6, 4, 3};
    return by_rows[rows - 1];
  }

  static Vec widen(F32, const std::byte* from) noexcept {
    return _mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(from)));
  }
  static Vec widen(F16, const std::byte* from) noexcept {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i_u*>(from)));
  }
  static Vec widen(BF16, const std::byte* from) noexcept {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i_u*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }

  static Vec zero() noexcept { return _mm256_setzero_ps(); }
  static Vec broadcast(float value) noexcept { return _mm256_set1_ps(value); }
  static Vec fma(Vec a, Vec b, Vec c) noexcept { return _mm256_fmadd_ps(a, b, c); }
  static float sum(Vec v) noexcept {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  static Vec load(const float* from) noexcept { return _mm256_loadu_ps(from); }
  static Vec load_part(const float* from, std::size_t count) noexcept {
    alignas(32) float part[lanes] = {};
    __builtin_memcpy(part, from, count * sizeof(float));
    return _mm256_load_ps(part);
  }
  static void store(float* to, Vec v) noexcept { _mm256_storeu_ps(to, v); }
  static void store_part(float* to, Vec v, std::size_t count) noexcept {
    alignas(32) float part[lanes];
    _mm256_store_ps(part, v);
    __builtin_memcpy(to, part, count * sizeof(float));
  }
  template <class W>
  static Vec load(W dtype, const std::byte* from) noexcept {
    return widen(dtype, from);
  }
  template <class W>
  static Vec load_part(W dtype, const std::byte* from, std::size_t count) noexcept {
    std::byte part[lanes * W::bytes] = {};
    __builtin_memcpy(part, from, count * W::bytes);
    return widen(dtype, part);
  }
};

}  // namespace

constinit const LinearTable avx2_linear = kernel::make_linear_table<Avx2>();

}  // namespace spmoe
