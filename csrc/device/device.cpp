#include "device/device.hpp"

#include "base/error.hpp"

namespace spmoe {

void check(const DeviceOptions& options) {
  if (options.copy_threads == 0 || !(options.link_gbps >= 0)) {
    throw InvalidArgument{"copy_threads must be at least 1 and link_gbps at least 0, got " +
                          std::to_string(options.copy_threads) + " and " +
                          std::to_string(options.link_gbps)};
  }
}

}  // namespace spmoe
