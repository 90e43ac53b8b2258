#include "compute/host/gated_activation.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace spmoe {
namespace {

float sigmoid(float value) noexcept { return 1.0F / (1.0F + std::exp(-value)); }

float silu(float value) noexcept { return value / (1.0F + std::exp(-value)); }

float gelu(float value) noexcept {
  return 0.5F * value * (1.0F + std::erf(value / std::numbers::sqrt2_v<float>));
}

float gelu_tanh(float value) noexcept {
  constexpr float scale = std::numbers::sqrt2_v<float> * std::numbers::inv_sqrtpi_v<float>;
  return 0.5F * value * (1.0F + std::tanh(scale * (value + 0.044715F * value * value * value)));
}

template <class Join>
void for_each_pair(const float* gate, const float* up, std::size_t stride, std::size_t count,
                   float* out, Join join) noexcept {
  for (std::size_t i = 0; i < count; ++i) out[i] = join(gate[i * stride], up[i * stride]);
}

}  // namespace

void apply_gate(const ActivationParams& params, const float* gate, const float* up,
                std::size_t stride, std::size_t count, float* out) noexcept {
  const auto each = [&](auto join) { for_each_pair(gate, up, stride, count, out, join); };
  switch (params.kind) {
    case Activation::silu: return each([](float g, float u) { return silu(g) * u; });
    case Activation::gelu: return each([](float g, float u) { return gelu(g) * u; });
    case Activation::gelu_tanh: return each([](float g, float u) { return gelu_tanh(g) * u; });
    case Activation::clamped_swiglu:
      // GptOssExperts._apply_gate of transformers; both clamps let NaN pass, as torch's do.
      return each([alpha = params.alpha, limit = params.limit](float g, float u) {
        g = std::min(g, limit);
        u = std::clamp(u, -limit, limit);
        return (u + 1.0F) * (g * sigmoid(g * alpha));
      });
  }
}

}  // namespace spmoe
