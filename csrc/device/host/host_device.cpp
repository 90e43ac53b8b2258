#include "device/host/host_device.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <system_error>

#include "base/bytes.hpp"
#include "base/error.hpp"
#include "device/copy/read_source.hpp"

namespace spmoe {
namespace {

constexpr std::uint64_t host_chunk_bytes = 1 << 20;

/// Threads that copy: a chunk has arrived when it has begun.
class HostMovers final : public ChunkMovers {
 public:
  explicit HostMovers(std::uint64_t chunk_bytes) : chunk_bytes_{chunk_bytes} {}

  std::unique_ptr<ChunkMover> make_mover() override { return std::make_unique<Mover>(); }
  std::uint64_t chunk_bytes() const override { return chunk_bytes_; }
  std::size_t window(CopyPriority) const override { return 1; }
  std::uint64_t part_bytes(const Extent&) const override { return chunk_bytes_; }
  bool gathers(const Extent&) const override { return false; }
  void make_consumer_wait(std::uintptr_t, std::uintptr_t) override {}

 private:
  class Mover final : public ChunkMover {
   public:
    BegunChunk begin(std::span<const ChunkPart> parts) override {
      return {0, read_source(parts.front().src, parts.front().dst)};
    }
    std::string finish() override { return {}; }
  };

  const std::uint64_t chunk_bytes_;
};

class HostDevice final : public Device {
 public:
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

  std::byte* allocate_pinned(std::size_t bytes) override { return allocate(bytes); }
  void deallocate_pinned(std::byte* data, std::size_t bytes) noexcept override {
    deallocate(data, bytes);
  }

  std::unique_ptr<ChunkMovers> make_movers(std::uint64_t chunk_bytes) override {
    return std::make_unique<HostMovers>(chunk_bytes == 0 ? host_chunk_bytes : chunk_bytes);
  }
  EventId record_event(std::uintptr_t) override { return 0; }
  EventId read_back(std::byte* pinned, const void* data, std::size_t bytes, std::uintptr_t,
                    HostWait) override {
    if (bytes > 0) std::memcpy(pinned, data, bytes);
    return 0;
  }
  void wait(EventId) override {}
  std::string lost() const override { return {}; }
};

}  // namespace

std::unique_ptr<Device> make_host_device() { return std::make_unique<HostDevice>(); }

}  // namespace spmoe
