#include "device/host/host_device.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <string>

#include "device_contract.hpp"

namespace spmoe {
namespace {

INSTANTIATE_TEST_SUITE_P(all, DeviceContract,
                         ::testing::Values(DeviceCase{"host", [] { return nullptr; },
                                                      make_host_device, read_host}),
                         [](const auto& test) { return test.param.name; });

TEST(HostDevice, goes_by_its_name) { EXPECT_EQ(make_host_device()->name(), "host"); }

TEST(HostDevice, refuses_more_memory_than_the_machine_has) {
  std::ifstream setting{"/proc/sys/vm/overcommit_memory"};
  if (std::string policy; setting >> policy && policy == "1") {
    GTEST_SKIP() << "this system promises any amount of memory";
  }
  const auto memory = static_cast<std::size_t>(::sysconf(_SC_PHYS_PAGES)) *
                      static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  const auto device = make_host_device();
  EXPECT_THROW(static_cast<void>(device->allocate(16 * memory)), OutOfMemory);
}

}  // namespace
}  // namespace spmoe
