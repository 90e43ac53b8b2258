#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "allocation_counter.hpp"
#include "base/bytes.hpp"
#include "base/convert.hpp"
#include "base/ring.hpp"
#include "base/stats.hpp"

namespace spmoe {
namespace {

/// One 16-bit float format: its conversions, and its bit layout for the reference.
struct HalfFormat {
  const char* name;
  DType dtype;
  float (*to_float)(std::uint16_t) noexcept;
  std::uint16_t (*from_float)(float) noexcept;
  int mantissa_bits;
  int bias;

  [[nodiscard]] std::uint16_t infinity() const {
    return static_cast<std::uint16_t>(0x7FFFU >> mantissa_bits << mantissa_bits);
  }
  [[nodiscard]] bool is_nan(std::uint16_t bits) const { return (bits & 0x7FFFU) > infinity(); }

  /// The value by definition: sign * significand * 2^exponent. Of infinity, the next power of two.
  [[nodiscard]] double value(std::uint16_t bits) const {
    const unsigned fraction = bits & ((1U << mantissa_bits) - 1);
    const int exponent = (bits & 0x7FFF) >> mantissa_bits;
    const unsigned hidden_bit = exponent == 0 ? 0U : 1U << mantissa_bits;
    const double magnitude = std::ldexp(static_cast<double>(hidden_bit + fraction),
                                        std::max(exponent, 1) - bias - mantissa_bits);
    return (bits & 0x8000U) != 0 ? -magnitude : magnitude;
  }
};

class Convert : public ::testing::TestWithParam<HalfFormat> {};

TEST_P(Convert, every_half_widens_to_its_value) {
  const HalfFormat& half = GetParam();
  for (std::uint32_t i = 0; i <= 0xFFFF; ++i) {
    const auto bits = static_cast<std::uint16_t>(i);
    const float value = half.to_float(bits);
    if (half.is_nan(bits)) {
      ASSERT_TRUE(std::isnan(value)) << bits;
    } else if ((bits & 0x7FFF) == half.infinity()) {
      ASSERT_TRUE(std::isinf(value)) << bits;
      ASSERT_EQ(std::signbit(value), bits > 0x7FFF);
    } else {
      ASSERT_EQ(static_cast<double>(value), half.value(bits)) << bits;
      ASSERT_EQ(std::signbit(value), bits > 0x7FFF) << bits;
    }
  }
}

TEST_P(Convert, every_half_survives_the_way_to_float_and_back) {
  const HalfFormat& half = GetParam();
  for (std::uint32_t i = 0; i <= 0xFFFF; ++i) {
    const auto bits = static_cast<std::uint16_t>(i);
    const std::uint16_t back = half.from_float(half.to_float(bits));
    if (half.is_nan(bits)) {
      ASSERT_TRUE(half.is_nan(back)) << bits;
    } else {
      ASSERT_EQ(back, bits);
    }
  }
}

TEST_P(Convert, a_float_rounds_to_the_nearest_half_and_a_tie_to_the_even_one) {
  const HalfFormat& half = GetParam();
  for (std::uint16_t below = 0; below < half.infinity(); ++below) {
    const auto above = static_cast<std::uint16_t>(below + 1);
    // Exact: it needs one bit more than a half has.
    const auto middle = static_cast<float>((half.value(below) + half.value(above)) / 2);
    const std::uint16_t even = below % 2 == 0 ? below : above;
    ASSERT_EQ(half.from_float(middle), even) << below;
    ASSERT_EQ(half.from_float(std::nextafter(middle, 0.0F)), below);
    ASSERT_EQ(half.from_float(std::nextafter(middle, HUGE_VALF)), above);
    ASSERT_EQ(half.from_float(-middle), even | 0x8000);
  }
}

TEST_P(Convert, what_is_too_large_becomes_infinity_and_nan_stays_nan) {
  const HalfFormat& half = GetParam();
  using Float = std::numeric_limits<float>;
  EXPECT_EQ(half.from_float(Float::max()), half.infinity());
  EXPECT_EQ(half.from_float(Float::infinity()), half.infinity());
  EXPECT_EQ(half.from_float(-Float::infinity()), half.infinity() | 0x8000);
  EXPECT_TRUE(half.is_nan(half.from_float(Float::quiet_NaN())));
  // Its payload lies in the bits that are cut off.
  EXPECT_TRUE(half.is_nan(half.from_float(std::bit_cast<float>(0x7F800001U))));
}

TEST_P(Convert, widen_and_narrow_convert_a_run_by_its_dtype) {
  const HalfFormat& half = GetParam();
  const std::vector<float> values{0.0F, -1.5F, 3.140625F, 1e-3F, -65000.0F};
  std::vector<std::uint16_t> narrowed(2 * values.size());  // GCC sees room for floats
  narrow(values.data(), values.size(), half.dtype, narrowed.data());
  std::vector<float> widened(values.size());
  widen(narrowed.data(), half.dtype, values.size(), widened.data());
  for (std::size_t i = 0; i < values.size(); ++i) {
    EXPECT_EQ(narrowed[i], half.from_float(values[i]));
    EXPECT_EQ(widened[i], half.to_float(narrowed[i]));
  }
}

INSTANTIATE_TEST_SUITE_P(
    all, Convert,
    ::testing::Values(HalfFormat{"bf16", DType::bf16, bf16_to_float, float_to_bf16, 7, 127},
                      HalfFormat{"f16", DType::f16, f16_to_float, float_to_f16, 10, 15}),
    [](const auto& test) { return test.param.name; });

TEST(ConvertFloat, floats_pass_unchanged) {
  const std::vector<float> values{0.1F, -0.0F, 1e-40F, std::numeric_limits<float>::max()};
  std::vector<float> narrowed(values.size());
  std::vector<float> widened(values.size());
  narrow(values.data(), values.size(), DType::f32, narrowed.data());
  widen(narrowed.data(), DType::f32, values.size(), widened.data());
  for (std::size_t i = 0; i < values.size(); ++i) {
    EXPECT_EQ(std::bit_cast<std::uint32_t>(widened[i]), std::bit_cast<std::uint32_t>(values[i]));
  }
}

TEST(ConvertFloat, nothing_is_converted_from_nowhere) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    widen(nullptr, dtype, 0, nullptr);
    narrow(nullptr, 0, dtype, nullptr);
  }
}

TEST(Ring, behaves_like_a_queue_through_growth_and_wrapping) {
  for (const std::uint32_t seed : {1U, 2U, 3U}) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    std::mt19937 random{seed};
    Ring<std::unique_ptr<int>> ring;
    std::deque<int> model;
    for (int step = 0; step < 5000; ++step) {
      // Phases of growth and of decline, so that the ring wraps at every size.
      if (model.empty() || random() % 5 < (step / 500 % 2 == 0 ? 3U : 2U)) {
        ring.push(std::make_unique<int>(step));
        model.push_back(step);
      } else {
        ASSERT_EQ(*ring.pop(), model.front());
        model.pop_front();
      }
      ASSERT_EQ(ring.size(), model.size());
      ASSERT_EQ(ring.empty(), model.empty());
      if (model.empty()) continue;
      const std::size_t i = random() % model.size();
      ASSERT_EQ(*ring[i], model[i]);
      ASSERT_EQ(*ring.front(), model.front());
    }
  }
}

TEST(Ring, allocates_nothing_below_its_longest_state) {
  Ring<int> ring;
  for (int i = 0; i < 100; ++i) ring.push(i);
  while (!ring.empty()) ring.pop();
  const std::size_t before = allocation_count();
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < 100; ++i) ring.push(i);
    while (!ring.empty()) ring.pop();
  }
  EXPECT_EQ(allocation_count() - before, 0u);
}

TEST(FormatBytes, picks_the_unit_that_people_read) {
  EXPECT_EQ(format_bytes(0), "0 bytes");
  EXPECT_EQ(format_bytes(1023), "1023 bytes");
  EXPECT_EQ(format_bytes(1024), "1.0 KiB");
  EXPECT_EQ(format_bytes(1536), "1.5 KiB");
  EXPECT_EQ(format_bytes((1 << 20) - 1), "1.0 MiB");  // not 1024.0 KiB
  EXPECT_EQ(format_bytes(352'321'536), "336.0 MiB");
  EXPECT_EQ(format_bytes(std::uint64_t{5} << 30), "5.0 GiB");
  EXPECT_EQ(format_bytes(std::uint64_t{3} << 40), "3.0 TiB");
  EXPECT_EQ(format_bytes(std::uint64_t{1} << 62), "4194304.0 TiB");
}

TEST(BlobFormat, parts_lie_behind_each_other) {
  constexpr BlobFormat plain{.hidden = 6, .inter = 4, .dtype = DType::bf16};
  EXPECT_EQ(plain.down_offset(), 2u * 4 * 6 * 2);
  EXPECT_EQ(plain.bytes(), 3u * 4 * 6 * 2);
  constexpr BlobFormat biased{.hidden = 6, .inter = 4, .dtype = DType::f32, .has_bias = true};
  EXPECT_EQ(biased.gate_up_bias_offset(), 3u * 4 * 6 * 4);
  EXPECT_EQ(biased.down_bias_offset(), 3u * 4 * 6 * 4 + 2u * 4 * 4);
  EXPECT_EQ(biased.bytes(), 3u * 4 * 6 * 4 + 2u * 4 * 4 + 6u * 4);
  EXPECT_EQ(name_of(DType::f16), "float16");
}

TEST(LayerStats, add_up_in_every_counter) {
  LayerStats sum{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 0.5, 0.25};
  sum += LayerStats{10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120, 130, 140, 1.0, 2.0};
  const LayerStats expected{11, 22, 33, 44, 55, 66, 77, 88, 99, 110, 121, 132, 143, 154, 1.5, 2.25};
  EXPECT_EQ(std::memcmp(&sum, &expected, sizeof(sum)), 0);
}

}  // namespace
}  // namespace spmoe
