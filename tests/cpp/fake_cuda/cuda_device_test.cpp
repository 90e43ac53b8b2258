#include "device/cuda/cuda_device.hpp"

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
                         ::testing::Values(DeviceCase{
                             "cuda", [] { return std::make_shared<Session>(); },
                             [] { return make_cuda_device(0); }, read_host}),
                         [](const auto& test) { return test.param.name; });

TEST(CudaDevice, goes_by_its_name) {
  const Session session{{.device_count = 2}};
  EXPECT_EQ(make_cuda_device(1)->name(), "cuda:1");
}

TEST(CudaDevice, says_why_there_is_none) {
  const auto reason = [](cudaError_t status, int driver) {
    const Session session{
        {.device_count = 0, .driver_version = driver, .device_count_status = status}};
    EXPECT_EQ(cuda_status().device_count, 0);
    EXPECT_EQ(message_of<DeviceError>([] { static_cast<void>(make_cuda_device(0)); }),
              cuda_status().reason);
    EXPECT_EQ(cudaGetLastError(), cudaSuccess) << "left for the next caller to stumble over";
    return cuda_status().reason;
  };
  EXPECT_EQ(reason(cudaErrorNoDevice, 13000), "there is no CUDA device here; use device=\"host\"");
  const std::string cure =
      "; install a driver for CUDA 13.0 or newer, build spmoe with an older CUDA toolkit, or use "
      "device=\"host\"";
  EXPECT_EQ(reason(cudaErrorInsufficientDriver, 0),
            "there is no CUDA driver here, and this spmoe needs one for CUDA 13.0" + cure);
  EXPECT_EQ(reason(cudaErrorInsufficientDriver, 12040),
            "the driver here is for CUDA 12.4, but this spmoe was built with CUDA 13.0" + cure);
  EXPECT_EQ(reason(cudaErrorUnknown, 13000),
            "CUDA 13.0 does not start: cudaErrorUnknown (cudaErrorUnknown)");
}

TEST(CudaDevice, refuses_a_card_that_lacks_what_the_kernels_need_before_anything_is_allocated) {
  const auto problem = [](const Settings& settings) {
    const Session session{settings};
    EXPECT_EQ(cuda_status().device_count, 1);
    const std::string found = cuda_device_problem(0);
    if (!found.empty()) {
      EXPECT_EQ(message_of<DeviceError>([] { static_cast<void>(make_cuda_device(0)); }), found);
    }
    for (const char* allocation : {"cudaMalloc", "cudaHostAlloc", "cudaStreamCreateWithPriority"}) {
      EXPECT_EQ(session.calls(allocation), 0u);
    }
    return found;
  };
  EXPECT_EQ(problem({.compute_capability = 75}),
            "cuda:0 (Fake GPU) has compute capability 7.5, but spmoe's kernels need 8.0 (Ampere) "
            "or newer; use another device, or device=\"host\"");
  EXPECT_EQ(problem({.memory_pools = false}),
            "cuda:0 (Fake GPU) has no memory pools, which spmoe allocates from; its driver may "
            "have switched them off; use another device, or device=\"host\"");
  EXPECT_EQ(problem({.compute_capability = 80}), "");
  EXPECT_EQ(problem({.compute_capability = 120}), "");
}

TEST(CudaDevice, a_card_that_does_not_answer_is_a_reason) {
  Session session;
  session.fail("cudaDeviceGetAttribute", 1, cudaErrorUnknown);
  const std::string problem = cuda_device_problem(0);
  EXPECT_TRUE(problem.starts_with("cuda:0 does not answer: ")) << problem;
  EXPECT_NE(problem.find("cudaErrorUnknown"), std::string::npos) << problem;
  EXPECT_EQ(cuda_device_problem(0), "");
}

TEST(CudaDevice, is_lost_once_an_error_breaks_its_context_and_not_before) {
  Session session{{.device_count = 2}};
  const auto device = make_cuda_device(1);
  EXPECT_EQ(device->lost(), "");
  session.fail("cudaHostAlloc", 1, cudaErrorMemoryAllocation);
  EXPECT_THROW(static_cast<void>(device->allocate_pinned(64)), OutOfMemory);
  EXPECT_EQ(device->lost(), "");
  const PinnedBuffer source{*device, 64};
  const Buffer buffer{*device, 64};
  Link link{*device};
  session.lose_context_at_copy(1, cudaErrorIllegalAddress);
  EXPECT_EQ(link.copy(buffer.data(), {{source.data(), -1, 0, 64}}).outcome, Outcome::failed);
  EXPECT_EQ(device->lost(),
            "cuda:1 is lost to this process, for an error broke its CUDA context "
            "(cudaErrorIllegalAddress (cudaErrorIllegalAddress)): restart the process");
  EXPECT_EQ(cudaGetLastError(), cudaSuccess) << "left for the next caller to stumble over";
}

TEST(CudaDevice, refuses_an_index_past_the_last) {
  const Session session{{.device_count = 2}};
  EXPECT_EQ(message_of<DeviceError>([] { static_cast<void>(make_cuda_device(2)); }),
            "cuda:2 asked, but there are 2 CUDA devices, from cuda:0");
}

TEST(CudaDevice, out_of_memory_names_what_was_asked_and_what_is_free) {
  const Session session{{.memory_bytes = 5 << 20}};
  const auto device = make_cuda_device(0);
  const Buffer taken{*device, 1 << 20};
  EXPECT_EQ(message_of<OutOfMemory>([&] { static_cast<void>(device->allocate(6 << 20)); }),
            "no memory for 6.0 MiB on cuda:0: 4.0 MiB free of 5.0 MiB; lower expert_memory");
}

}  // namespace
}  // namespace spmoe
