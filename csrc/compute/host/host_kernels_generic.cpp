#include <array>

#include "compute/host/host_kernel.hpp"

namespace spmoe {

std::span<const HostKernel> host_kernels() noexcept {
  static constexpr std::array kernels{
      HostKernel{"baseline", []() noexcept { return true; }, &baseline_linear},
  };
  return kernels;
}

}  // namespace spmoe
