#include "device/cuda/cuda_device.hpp"

#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "device_contract.hpp"

namespace spmoe {
namespace {

Bytes read_cuda(const std::byte* memory, std::size_t bytes) {
  const auto device = make_cuda_device(0);
  const PinnedBuffer pinned{*device, bytes};
  device->wait(device->read_back(pinned.data(), memory, bytes, 0, HostWait::sleep));
  return {pinned.data(), pinned.data() + bytes};
}

std::vector<DeviceCase> devices() {
  if (cuda_status().device_count == 0) return {};
  return {
      DeviceCase{"cuda", [] { return nullptr; }, [] { return make_cuda_device(0); }, read_cuda}};
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(DeviceContract);  // without a GPU
INSTANTIATE_TEST_SUITE_P(hardware, DeviceContract, ::testing::ValuesIn(devices()),
                         [](const auto& test) { return test.param.name; });

TEST(CudaHardware, is_there_if_it_is_required) {
  const CudaStatus status = cuda_status();
  const char* required = std::getenv("REQUIRE_CUDA");
  if (status.device_count > 0) {
    EXPECT_EQ(make_cuda_device(0)->name(), "cuda:0");
  } else if (required != nullptr && std::string{required} == "1") {
    FAIL() << status.reason;
  } else {
    GTEST_SKIP() << status.reason;
  }
}

}  // namespace
}  // namespace spmoe
