#include <immintrin.h>

#include "compute/host/expert_ffn_kernel.hpp"

namespace spmoe {
namespace {

using kernel::BF16;
using kernel::F16;
using kernel::F32;

struct Avx512 {
  using Vec = __m512;
  static constexpr std::size_t lanes = 16;
  static constexpr std::size_t max_rows = 4;
  static constexpr std::size_t outs(std::size_t rows) { return rows <= 2 ? 8 : 6; }

  static constexpr __mmask16 all = 0xFFFF;

  static __mmask16 mask(std::size_t count) noexcept {
    return static_cast<__mmask16>((1U << count) - 1U);
  }
  // The zero-masking forms cost the same; GCC 12 warns of undefined lanes in its plain ones.
  static Vec widen(F16, __m256i halves) noexcept { return _mm512_maskz_cvtph_ps(all, halves); }
  static Vec widen(BF16, __m256i halves) noexcept {
    const __m512i words = _mm512_maskz_cvtepu16_epi32(all, halves);
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(all, words, 16));
  }

  static Vec zero() noexcept { return _mm512_setzero_ps(); }
  static Vec broadcast(float value) noexcept { return _mm512_set1_ps(value); }
  static Vec fma(Vec a, Vec b, Vec c) noexcept { return _mm512_fmadd_ps(a, b, c); }
  static float sum(Vec v) noexcept {
    const __m256 eight = _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xFF, v, 0),
                                       _mm512_maskz_extractf32x8_ps(0xFF, v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  static Vec load(const float* from) noexcept { return _mm512_loadu_ps(from); }
  static Vec load_part(const float* from, std::size_t count) noexcept {
    return _mm512_maskz_loadu_ps(mask(count), from);
  }
  static void store(float* to, Vec v) noexcept { _mm512_storeu_ps(to, v); }
  static void store_part(float* to, Vec v, std::size_t count) noexcept {
    _mm512_mask_storeu_ps(to, mask(count), v);
  }
  static Vec load(F32, const std::byte* from) noexcept { return _mm512_loadu_ps(from); }
  static Vec load_part(F32, const std::byte* from, std::size_t count) noexcept {
    return _mm512_maskz_loadu_ps(mask(count), from);
  }
  template <class Half>
  static Vec load(Half half, const std::byte* from) noexcept {
    return widen(half, _mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(from)));
  }
  template <class Half>
  static Vec load_part(Half half, const std::byte* from, std::size_t count) noexcept {
    return widen(half, _mm256_maskz_loadu_epi16(mask(count), from));
  }
};

}  // namespace

constinit const LinearTable avx512_linear = kernel::make_linear_table<Avx512>();

}  // namespace spmoe
