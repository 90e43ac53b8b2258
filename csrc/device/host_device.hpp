#pragma once

#include <cstdint>
#include <memory>

#include "device/device.hpp"

namespace spmoe {

/// Faults that tests plant in the link. All zero: none.
struct LinkFaults {
  std::uint64_t fail_at_copy = 0;  ///< the n-th piece copied from now on fails, once; 0: none
  std::uint32_t delay_seed = 0;    ///< with `max_delay_us`: pieces wait a seeded random time
  std::uint32_t max_delay_us = 0;
};

struct HostDeviceOptions {
  unsigned copy_threads = 2;
  /// Bytes read by one call; a larger copy is cut, so that threads share it and a demand waits
  /// for one piece at most.
  std::uint64_t piece_bytes = 1 << 20;
  double link_gbps = 0;  ///< paces the link to so many 10^9 bytes a second; 0: unpaced
  LinkFaults faults{};
};

/// A device whose memory is RAM, whose streams are served by a pool of threads, and whose slower
/// tier is memory or files read by pread.
class HostDevice : public Device {
 public:
  /// Replaces the planted faults and restarts their count.
  virtual void inject(const LinkFaults& faults) = 0;
};

/// @throws InvalidArgument if an option is zero or negative where it may not be.
std::unique_ptr<HostDevice> make_host_device(const HostDeviceOptions& options);

}  // namespace spmoe
