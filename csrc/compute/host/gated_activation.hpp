#pragma once

#include <cstddef>

#include "compute/expert_ffn.hpp"

namespace spmoe {

/// out[i] = act(gate[i * stride]) * up[i * stride], or gpt_oss's clamped form, for `count` values.
void apply_gate(const ActivationParams& params, const float* gate, const float* up,
                std::size_t stride, std::size_t count, float* out) noexcept;

}  // namespace spmoe
