#pragma once

#include "base/blob.hpp"

/// Layouts that the CUDA kernels are run over, emulated or not.
namespace spmoe {

struct Layout {
  const char* name;
  bool transposed, interleaved, has_bias;
};
inline constexpr Layout layouts[] = {{"plain", false, false, false},
                                     {"plain_interleaved_bias", false, true, true},
                                     {"transposed", true, false, true},
                                     {"gpt_oss", true, true, true}};
inline constexpr DType dtypes[] = {DType::f32, DType::f16, DType::bf16};

}  // namespace spmoe
