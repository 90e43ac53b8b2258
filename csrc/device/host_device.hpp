#pragma once

#include <memory>

#include "device/device.hpp"

namespace spmoe {

/// A device whose memory is RAM, whose streams are served by a pool of threads, and whose slower
/// tier is memory or files read by pread. Its consumers are threads, which read what has landed.
/// @throws InvalidArgument as `check`.
std::unique_ptr<Device> make_host_device(const DeviceOptions& options);

}  // namespace spmoe
