#include "device/make_device.hpp"

#include <charconv>
#include <string>

#include "base/error.hpp"
#include "device/cuda/cuda_device.hpp"
#include "device/host/host_device.hpp"

namespace spmoe {

std::optional<int> cuda_index(std::string_view name) {
  if (name == "cuda") return 0;
  constexpr std::string_view prefix = "cuda:";
  if (!name.starts_with(prefix)) return std::nullopt;
  const char* end = name.data() + name.size();
  int index = -1;
  const auto [stop, error] = std::from_chars(name.data() + prefix.size(), end, index);
  return error == std::errc{} && stop == end && index >= 0 ? std::optional{index} : std::nullopt;
}

std::unique_ptr<Device> make_device(std::string_view name) {
  if (name == "host") return make_host_device();
  if (const auto index = cuda_index(name)) return make_cuda_device(*index);
  throw InvalidArgument{"device \"" + std::string{name} +
                        "\" is not one of host, cuda, cuda:<index>"};
}

}  // namespace spmoe
