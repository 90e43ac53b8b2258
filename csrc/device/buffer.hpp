#pragma once

#include <cstddef>

#include "device/device.hpp"

namespace spmoe {

/// Sole owner of one allocation of a device, which must outlive it.
class Buffer {
 public:
  Buffer(Device& device, std::size_t bytes)
      : device_{device}, data_{device.allocate(bytes)}, bytes_{bytes} {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { device_.deallocate(data_, bytes_); }

  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }

 private:
  Device& device_;
  std::byte* data_;
  std::size_t bytes_;
};

}  // namespace spmoe
