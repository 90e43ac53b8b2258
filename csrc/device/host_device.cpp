#include "device/host_device.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <system_error>

#include "base/bytes.hpp"
#include "base/error.hpp"
#include "device/copy_pool.hpp"

namespace spmoe {
namespace {

class HostStream final : public Stream {
 public:
  HostStream(CopyPool& pool, StreamPriority priority) : pool_{pool}, channel_{pool, priority} {}

  Fence submit(std::span<const CopyBatch> batches) override {
    return pool_.submit(channel_, batches);
  }
  void withdraw(Fence fence) override { pool_.withdraw(channel_, fence); }
  void promote(Fence fence) override { pool_.promote(channel_, fence); }
  BatchEnd next_end() override { return pool_.next_end(channel_); }

 private:
  CopyPool& pool_;
  CopyPool::Channel channel_;
};

class ThreadedHostDevice final : public HostDevice {
 public:
  explicit ThreadedHostDevice(const HostDeviceOptions& options) : pool_{options} {}

  std::string_view name() const noexcept override { return "host"; }

  std::byte* allocate(std::size_t bytes) override {
    void* data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) {
      const auto free_bytes = static_cast<std::uint64_t>(::sysconf(_SC_AVPHYS_PAGES)) *
                              static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
      throw OutOfMemory{"no memory for " + format_bytes(bytes) + ": " +
                        std::generic_category().message(errno) + ", " + format_bytes(free_bytes) +
                        " free on host; lower expert_memory"};
    }
    ::madvise(data, bytes, MADV_HUGEPAGE);  // a hint: failure changes speed alone
    return static_cast<std::byte*>(data);
  }
  void deallocate(std::byte* data, std::size_t bytes) noexcept override { ::munmap(data, bytes); }

  std::unique_ptr<Stream> make_stream(StreamPriority priority) override {
    return std::make_unique<HostStream>(pool_, priority);
  }
  LinkStats link_stats() const override { return pool_.stats(); }
  void inject(const LinkFaults& faults) override { pool_.inject(faults); }

 private:
  CopyPool pool_;
};

}  // namespace

std::unique_ptr<HostDevice> make_host_device(const HostDeviceOptions& options) {
  if (options.copy_threads == 0 || options.piece_bytes == 0 || !(options.link_gbps >= 0)) {
    throw InvalidArgument{
        "copy_threads and piece_bytes must be at least 1 and link_gbps at least 0"};
  }
  return std::make_unique<ThreadedHostDevice>(options);
}

}  // namespace spmoe
