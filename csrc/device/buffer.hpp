#pragma once

#include <cstddef>

#include "device/device.hpp"

namespace spmoe {

/// Sole owner of one allocation of a device, which must outlive it.
template <std::byte* (Device::*Allocate)(std::size_t),
          void (Device::*Deallocate)(std::byte*, std::size_t) noexcept>
class BasicBuffer {
 public:
  BasicBuffer(Device& device, std::size_t bytes)
      : device_{device}, data_{(device.*Allocate)(bytes)}, bytes_{bytes} {}
  BasicBuffer(const BasicBuffer&) = delete;
  BasicBuffer& operator=(const BasicBuffer&) = delete;
  ~BasicBuffer() { (device_.*Deallocate)(data_, bytes_); }

  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }

 private:
  Device& device_;
  std::byte* data_;
  std::size_t bytes_;
};

using Buffer = BasicBuffer<&Device::allocate, &Device::deallocate>;
using PinnedBuffer = BasicBuffer<&Device::allocate_pinned, &Device::deallocate_pinned>;

}  // namespace spmoe
