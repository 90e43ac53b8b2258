#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "base/blob.hpp"
#include "base/convert.hpp"
#include "compute/expert_ffn.hpp"

namespace spmoe {

/// One expert with random weights, kept both as a blob and widened for the reference.
struct RandomExpert {
  RandomExpert(const BlobFormat& blob_format, std::uint32_t seed, std::size_t misalignment = 0)
      : format{blob_format}, bytes(misalignment + format.bytes()), start{misalignment} {
    std::mt19937 random{seed};
    const auto fill = [&](std::size_t offset, std::size_t count, float spread) {
      if (count == 0) return std::vector<float>{};
      std::normal_distribution<float> normal{0.0F, spread};
      std::vector<float> values(count);
      std::ranges::generate(values, [&] { return normal(random); });
      std::vector<std::uint32_t> narrowed(count);
      narrow(values.data(), count, format.dtype, narrowed.data());
      widen(narrowed.data(), format.dtype, count, values.data());
      std::memcpy(bytes.data() + start + offset, narrowed.data(), count * size_of(format.dtype));
      return values;
    };
    const std::size_t matrix = std::size_t{format.inter} * format.hidden;
    gate_up = fill(0, 2 * matrix, 1.0F / std::sqrt(static_cast<float>(format.hidden)));
    down = fill(format.down_offset(), matrix, 1.0F / std::sqrt(static_cast<float>(format.inter)));
    gate_up_bias = fill(format.gate_up_bias_offset(), format.has_bias ? 2 * format.inter : 0, 0.5F);
    down_bias = fill(format.down_bias_offset(), format.has_bias ? format.hidden : 0, 0.5F);
  }

  [[nodiscard]] const std::byte* blob() const { return bytes.data() + start; }

  BlobFormat format;
  std::vector<std::byte> bytes;
  std::size_t start;
  std::vector<float> gate_up, down, gate_up_bias, down_bias;
};

inline double activate(Activation kind, double gate, double up, const ActivationParams& params) {
  switch (kind) {
    case Activation::silu: return gate / (1 + std::exp(-gate)) * up;
    case Activation::gelu: return 0.5 * gate * (1 + std::erf(gate / std::sqrt(2.0))) * up;
    case Activation::gelu_tanh: {
      const double inner = std::sqrt(2 / std::acos(-1.0)) * (gate + 0.044715 * std::pow(gate, 3));
      return 0.5 * gate * (1 + std::tanh(inner)) * up;
    }
    case Activation::clamped_swiglu: {
      const double alpha = params.alpha;
      const double limit = params.limit;
      gate = std::min(gate, limit);
      up = std::min(std::max(up, -limit), limit);
      return (up + 1) * gate / (1 + std::exp(-gate * alpha));
    }
  }
  return 0;
}

inline std::vector<double> linear(const std::vector<float>& weight, const std::vector<float>& bias,
                                  std::size_t outputs, bool transposed,
                                  const std::vector<double>& x) {
  std::vector<double> y(outputs);
  for (std::size_t o = 0; o < outputs; ++o) {
    y[o] = bias.empty() ? 0.0 : static_cast<double>(bias[o]);
    for (std::size_t i = 0; i < x.size(); ++i) {
      y[o] += x[i] * static_cast<double>(weight[transposed ? i * outputs + o : o * x.size() + i]);
    }
  }
  return y;
}

/// The definition, in double precision.
inline std::vector<double> reference(const RandomExpert& expert, const ActivationParams& params,
                                     const float* row) {
  const BlobFormat& format = expert.format;
  const std::vector<double> x(row, row + format.hidden);
  const std::vector<double> both = linear(expert.gate_up, expert.gate_up_bias,
                                          std::size_t{2} * format.inter, format.transposed, x);
  std::vector<double> h(format.inter);
  for (std::size_t i = 0; i < h.size(); ++i) {
    const std::size_t gate = format.interleaved ? 2 * i : i;
    const std::size_t up = format.interleaved ? 2 * i + 1 : format.inter + i;
    h[i] = activate(params.kind, both[gate], both[up], params);
  }
  return linear(expert.down, expert.down_bias, format.hidden, format.transposed, h);
}

}  // namespace spmoe
