#include "device/host_device.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "base/bytes.hpp"
#include "base/error.hpp"
#include "base/ring.hpp"
#include "device/link_pacer.hpp"

namespace spmoe {
namespace {

/// Copies one piece. Returns what went wrong, empty if nothing.
std::string copy_piece(const CopyOp& piece) {
  if (piece.src.data != nullptr) {
    std::memcpy(piece.dst, piece.src.data + piece.src.offset, piece.src.bytes);
    return {};
  }
  for (std::uint64_t done = 0; done < piece.src.bytes;) {
    const auto offset = piece.src.offset + done;
    const auto count = ::pread(piece.src.file, piece.dst + done, piece.src.bytes - done,
                               static_cast<off_t>(offset));
    if (count > 0) {
      done += static_cast<std::uint64_t>(count);
    } else if (count == 0) {
      return "the file ends at byte " + std::to_string(offset) + ", " +
             std::to_string(piece.src.bytes - done) +
             " bytes short: it was truncated after it was opened";
    } else if (errno != EINTR) {
      return "read of " + std::to_string(piece.src.bytes - done) + " bytes at offset " +
             std::to_string(offset) + " failed: " + std::generic_category().message(errno);
    }
  }
  return {};
}

/// Batches of one stream that have not ended, oldest first.
struct BatchLog {
  struct Batch {
    std::uint32_t pieces_left = 0;
    std::string error;
  };
  Ring<Batch> open;
  Fence first_open = 1;
  std::vector<std::pair<Fence, std::string>> failures;  // ended, not told yet

  Batch& at(Fence fence) { return open[fence - first_open]; }
  [[nodiscard]] bool done(Fence fence) const { return fence < first_open; }

  void retire() {
    for (; !open.empty() && open.front().pieces_left == 0; ++first_open) {
      Batch ended = open.pop();
      if (!ended.error.empty()) failures.emplace_back(first_open, std::move(ended.error));
    }
  }
};

struct Piece {
  CopyOp op;
  BatchLog* log = nullptr;
  Fence fence = 0;
  StreamPriority priority = StreamPriority::demand;
  std::uint64_t prefetched = 0;  // bytes of prefetches that had ended when it was submitted
};

/// The copy threads and their two queues. Demand pieces are always taken first.
class CopyPool {
 public:
  explicit CopyPool(const HostDeviceOptions& options)
      : piece_bytes_{options.piece_bytes}, pacer_{options.link_gbps, options.faults} {
    for (unsigned i = 0; i < options.copy_threads; ++i) threads_.emplace_back([this] { serve(); });
  }
  CopyPool(const CopyPool&) = delete;
  CopyPool& operator=(const CopyPool&) = delete;

  ~CopyPool() {
    {
      const std::scoped_lock lock{mutex_};
      stopping_ = true;
    }
    work_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  Fence submit(BatchLog& log, StreamPriority priority, std::span<const CopyOp> ops) {
    const std::scoped_lock lock{mutex_};
    const Fence fence = log.first_open + log.open.size();
    std::uint32_t pieces = 0;
    // All threads may be at a prefetch when a demand comes: together they hold it up by one piece.
    const std::uint64_t piece_bytes =
        priority == StreamPriority::demand
            ? piece_bytes_
            : std::max<std::uint64_t>(piece_bytes_ / threads_.size(), 1);
    const std::uint64_t prefetched = prefetch_started_ - prefetch_active_;
    for (const CopyOp& op : ops) {
      for (std::uint64_t start = 0; start < op.src.bytes; start += piece_bytes) {
        CopyOp piece{op.dst + start, op.src};
        piece.src.offset += start;
        piece.src.bytes = std::min(piece_bytes, op.src.bytes - start);
        queues_[static_cast<std::size_t>(priority)].push(
            {piece, &log, fence, priority, prefetched});
        ++pieces;
      }
    }
    log.open.push({pieces, {}});
    log.retire();  // an empty batch ends here if it is the oldest
    if (pieces == 1) {
      work_.notify_one();
    } else {
      work_.notify_all();
    }
    return fence;
  }

  void wait(BatchLog& log, Fence fence) {
    std::unique_lock lock{mutex_};
    ended_.wait(lock, [&] { return log.done(fence); });
    const auto failure =
        std::ranges::find(log.failures, fence, &std::pair<Fence, std::string>::first);
    if (failure == log.failures.end()) return;
    const std::string message = std::move(failure->second);
    log.failures.erase(failure);
    throw DeviceError{message};
  }

  void inject(const LinkFaults& faults) {
    const std::scoped_lock lock{mutex_};
    pacer_.inject(faults);
  }

  LinkStats stats() {
    const std::scoped_lock lock{mutex_};
    LinkStats now = stats_;
    if (active_ > 0) now.busy_s += seconds_since(busy_from_);
    return now;
  }

 private:
  using Clock = std::chrono::steady_clock;
  static double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  }

  Ring<Piece>* waiting() {
    auto& demand = queues_[static_cast<std::size_t>(StreamPriority::demand)];
    auto& prefetch = queues_[static_cast<std::size_t>(StreamPriority::prefetch)];
    if (!demand.empty()) return &demand;
    return prefetch.empty() ? nullptr : &prefetch;
  }

  void serve() {
    std::unique_lock lock{mutex_};
    while (true) {
      work_.wait(lock, [this] { return stopping_ || waiting() != nullptr; });
      auto* queue = waiting();
      if (queue == nullptr) return;  // stopping, and everything submitted has been served
      const Piece piece = queue->pop();
      if (active_++ == 0) busy_from_ = Clock::now();
      begin(piece);
      const auto ticket = pacer_.admit(piece.op.src.bytes);
      lock.unlock();
      std::string error = ticket.fail ? "read error injected by a test" : copy_piece(piece.op);
      LinkPacer::hold(ticket);
      lock.lock();
      if (--active_ == 0) stats_.busy_s += seconds_since(busy_from_);
      finish(piece, std::move(error));
    }
  }

  void begin(const Piece& piece) {
    if (piece.priority == StreamPriority::prefetch) {
      prefetch_started_ += piece.op.src.bytes;
      prefetch_active_ += piece.op.src.bytes;
    } else {
      stats_.prefetch_before_demand =
          std::max(stats_.prefetch_before_demand, prefetch_started_ - piece.prefetched);
    }
  }

  void finish(const Piece& piece, std::string error) {
    if (piece.priority == StreamPriority::prefetch) prefetch_active_ -= piece.op.src.bytes;
    auto& batch = piece.log->at(piece.fence);
    if (error.empty()) {
      stats_.bytes += piece.op.src.bytes;
    } else if (batch.error.empty()) {
      batch.error = std::move(error);
    }
    if (--batch.pieces_left == 0) {
      piece.log->retire();
      ended_.notify_all();
    }
  }

  const std::uint64_t piece_bytes_;
  std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable ended_;
  std::array<Ring<Piece>, 2> queues_;  // by StreamPriority
  LinkPacer pacer_;
  LinkStats stats_;
  std::uint64_t prefetch_started_ = 0;  // bytes
  std::uint64_t prefetch_active_ = 0;   // of these, under way
  Clock::time_point busy_from_;
  unsigned active_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

class HostStream final : public Stream {
 public:
  HostStream(CopyPool& pool, StreamPriority priority) : pool_{pool}, priority_{priority} {}
  // The pool's threads write to `log_` until the last batch has ended.
  ~HostStream() override {
    try {
      if (last_ != 0) pool_.wait(log_, last_);
    } catch (const DeviceError&) {  // nobody is left to be told
    }
  }

  Fence copy_batch(std::span<const CopyOp> ops) override {
    return last_ = pool_.submit(log_, priority_, ops);
  }
  void wait(Fence fence) override { pool_.wait(log_, fence); }

 private:
  CopyPool& pool_;
  StreamPriority priority_;
  BatchLog log_;
  Fence last_ = 0;
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
  mutable CopyPool pool_;
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
