#include "device/cuda_device.hpp"

#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "device_contract.hpp"
#include "fake_cuda.hpp"

namespace spmoe {
namespace {

using fake_cuda::Session;
using fake_cuda::Settings;

INSTANTIATE_TEST_SUITE_P(fake_cuda, DeviceContract,
                         ::testing::Values(DeviceCase{"cuda",
                                                      [] { return std::make_shared<Session>(); },
                                                      [](const DeviceOptions& options) {
                                                        return make_cuda_device(0, options);
                                                      },
                                                      read_host, true}),
                         [](const auto& test) { return test.param.name; });

TEST(CudaDevice, goes_by_its_name) {
  const Session session{{.device_count = 2}};
  EXPECT_EQ(make_cuda_device(1, {})->name(), "cuda:1");
}

TEST(CudaDevice, says_why_there_is_none) {
  const auto reason = [](cudaError_t status) {
    const Session session{{.device_count = 0, .device_count_status = status}};
    EXPECT_EQ(cuda_status().device_count, 0);
    EXPECT_EQ(message_of<DeviceError>([] { static_cast<void>(make_cuda_device(0, {})); }),
              cuda_status().reason);
    EXPECT_EQ(cudaGetLastError(), cudaSuccess) << "left for the next caller to stumble over";
    return cuda_status().reason;
  };
  EXPECT_EQ(reason(cudaErrorNoDevice), "there is no CUDA device here; use device=\"host\"");
  EXPECT_EQ(reason(cudaErrorInsufficientDriver),
            "there is no CUDA driver, or one too old for CUDA 13.0, which this spmoe was built "
            "with; install a newer one, or use device=\"host\"");
  EXPECT_EQ(reason(cudaErrorUnknown),
            "CUDA 13.0 does not start: cudaErrorUnknown (cudaErrorUnknown)");
}

TEST(CudaDevice, refuses_an_index_past_the_last) {
  const Session session{{.device_count = 2}};
  EXPECT_EQ(message_of<DeviceError>([] { static_cast<void>(make_cuda_device(2, {})); }),
            "cuda:2 asked, but there are 2 CUDA devices, from cuda:0");
}

TEST(CudaDevice, out_of_memory_names_what_was_asked_and_what_is_free) {
  const Session session{{.memory_bytes = 5 << 20}};
  const auto device = make_cuda_device(0, {});
  const Buffer taken{*device, 1 << 20};
  EXPECT_EQ(message_of<OutOfMemory>([&] { static_cast<void>(device->allocate(6 << 20)); }),
            "no memory for 6.0 MiB on cuda:0: 4.0 MiB free of 5.0 MiB; lower expert_memory");
}

}  // namespace
}  // namespace spmoe
