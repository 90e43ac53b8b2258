#pragma once

#include <memory>
#include <optional>
#include <string_view>

#include "device/device.hpp"

namespace spmoe {

/// The index that "cuda:<index>" names, 0 for "cuda"; nothing if `name` is of no CUDA device.
[[nodiscard]] std::optional<int> cuda_index(std::string_view name);

/// The device called "host", "cuda" or "cuda:<index>".
/// @throws InvalidArgument if nothing is called so; DeviceError as `make_cuda_device`.
[[nodiscard]] std::unique_ptr<Device> make_device(std::string_view name);

}  // namespace spmoe
