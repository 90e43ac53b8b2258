#include <array>

#include "compute/host/host_kernel.hpp"

namespace spmoe {
namespace {

bool has_avx512() noexcept {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

// Every processor with AVX2 converts half floats too (F16C).
bool has_avx2() noexcept { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool always() noexcept { return true; }

}  // namespace

std::span<const HostKernel> host_kernels() noexcept {
  static constexpr std::array kernels{
      HostKernel{"avx512", has_avx512, &avx512_linear},
      HostKernel{"avx2", has_avx2, &avx2_linear},
      HostKernel{"baseline", always, &baseline_linear},
  };
  return kernels;
}

}  // namespace spmoe
