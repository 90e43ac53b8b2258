#include "device/host_device.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <system_error>

#include "base/bytes.hpp"
#include "base/error.hpp"
#include "device/copy_pool.hpp"
#include "device/read_source.hpp"

namespace spmoe {
namespace {

constexpr std::uint64_t host_piece_bytes = 1 << 20;

/// Threads that copy: a piece has landed when it has begun.
class HostMovers final : public PieceMovers {
 public:
  explicit HostMovers(std::uint64_t piece_bytes) : piece_bytes_{piece_bytes} {}

  std::unique_ptr<PieceMover> make_mover() override { return std::make_unique<Mover>(); }
  std::size_t window(StreamPriority) const override { return 1; }
  std::uint64_t move_bytes(const Extent&) const override { return piece_bytes_; }
  bool gathers(const Extent&) const override { return false; }
  void make_consumer_wait(std::uintptr_t, std::uintptr_t) override {}

 private:
  class Mover final : public PieceMover {
   public:
    BegunPiece begin(std::span<const Move> moves) override {
      return {0, read_source(moves.front().op.src, moves.front().op.dst)};
    }
    std::string finish() override { return {}; }
  };

  const std::uint64_t piece_bytes_;
};

class HostDevice final : public Device {
 public:
  explicit HostDevice(const DeviceOptions& options)
      : movers_{options.piece_bytes}, pool_{movers_, options} {}

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

  std::unique_ptr<Stream> make_stream(StreamPriority priority) override {
    return std::make_unique<PoolStream>(pool_, priority);
  }
  Mark mark(std::uintptr_t) override { return 0; }
  Mark read_back(std::byte* pinned, const void* data, std::size_t bytes, std::uintptr_t,
                 HostWait) override {
    if (bytes > 0) std::memcpy(pinned, data, bytes);
    return 0;
  }
  void wait(Mark) override {}

  std::string lost() const override { return {}; }
  LinkStats link_stats() const override { return pool_.stats(); }
  void inject(const LinkFaults& faults) override { pool_.inject(faults); }

 private:
  HostMovers movers_;
  CopyPool pool_;
};

}  // namespace

std::unique_ptr<Device> make_host_device(const DeviceOptions& options) {
  check(options);
  DeviceOptions chosen = options;
  if (chosen.piece_bytes == 0) chosen.piece_bytes = host_piece_bytes;
  return std::make_unique<HostDevice>(chosen);
}

}  // namespace spmoe
