#pragma once

#include <memory>

#include "device/device.hpp"

namespace spmoe {

/// A device whose memory is RAM, whose chunks are copied by the threads of a copy engine, and whose
/// slower tier is memory or files read by pread. Its consumers are threads, which read what has
/// arrived.
std::unique_ptr<Device> make_host_device();

}  // namespace spmoe
