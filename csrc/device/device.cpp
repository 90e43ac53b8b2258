#include "device/device.hpp"

#include <cmath>
#include <sstream>

#include "base/error.hpp"

namespace spmoe {

void check(const DeviceOptions& options) {
  constexpr unsigned most = DeviceOptions::max_copy_threads;
  if (options.copy_threads == 0 || options.copy_threads > most) {
    throw InvalidArgument{"copy_threads is " + std::to_string(options.copy_threads) +
                          "; give 1 to " + std::to_string(most)};
  }
  const double gbps = options.link_gbps;
  if (gbps != 0 && (!std::isfinite(gbps) || gbps < DeviceOptions::min_link_gbps)) {
    std::ostringstream message;
    message << "link_gbps is " << gbps << "; give 0 for a link that is not paced, or at least "
            << DeviceOptions::min_link_gbps << " (10^9 bytes a second)";
    throw InvalidArgument{message.str()};
  }
}

}  // namespace spmoe
