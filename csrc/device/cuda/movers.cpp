#include "device/cuda/movers.hpp"

#include <algorithm>
#include <exception>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "base/bytes.hpp"
#include "base/error.hpp"
#include "device/copy/read_source.hpp"
#include "device/cuda/batch_copy.hpp"
#include "device/cuda/handle.hpp"

namespace spmoe::cuda {
namespace {

// Prefetches are handed to the device two chunks ahead, so that it never idles and a demand has
// little before it. Nothing goes before a demand, so as many chunks of it as there are.
constexpr std::size_t prefetch_window = 2;
constexpr std::size_t demand_window = 64;

// Bytes that a thread reads from a file at a time, while the device copies those read before.
constexpr std::uint64_t most_bounce_bytes = std::uint64_t{2} << 20;
constexpr std::size_t bounce_buffers = 4;  // of each thread

/// A page-locked buffer and the end of the last copy from it.
struct Bounce {
  UniqueHandle<void*, cudaFreeHost> memory;
  Event copied;

  explicit Bounce(std::size_t bytes) : copied{make_event(/*blocking=*/true)} {
    void* raw = nullptr;
    const cudaError_t status = cudaHostAlloc(&raw, bytes, cudaHostAllocPortable);
    if (status != cudaSuccess) {
      static_cast<void>(cudaGetLastError());
      throw OutOfMemory{"no page-locked memory for a buffer of " + format_bytes(bytes) + ": " +
                        describe(status) + "; free some, or use device=\"host\""};
    }
    memory = UniqueHandle<void*, cudaFreeHost>{raw};
  }
  [[nodiscard]] std::byte* data() const { return static_cast<std::byte*>(memory.get()); }
};

class Mover final : public ChunkMover {
 public:
  Mover(int device_index, std::uint64_t bounce_bytes, ConsumerEvents& events,
        const PinnedRanges& pinned)
      : device_index_{device_index}, events_{events}, pinned_{pinned}, stream_{make_stream()} {
    for (std::size_t i = 0; i < bounce_buffers; ++i) ring_.emplace_back(bounce_bytes);
  }
  Mover(const Mover&) = delete;
  Mover& operator=(const Mover&) = delete;
  ~Mover() override { static_cast<void>(cudaStreamSynchronize(stream_.get())); }

  BegunChunk begin(std::span<const ChunkPart> parts) override {
    bool enqueued = false;
    try {
      const CurrentDevice device{device_index_};
      Bounce* bounce = nullptr;
      batch_.clear();
      for (const ChunkPart& part : parts) {
        const Extent& src = part.src;
        const std::byte* from = src.data == nullptr ? nullptr : src.data + src.offset;
        if (!pinned_.contains(from, src.bytes)) {
          bounce = &next_bounce();
          if (std::string error = read_source(src, bounce->data()); !error.empty()) {
            return {0, std::move(error)};
          }
          from = bounce->data();
        }
        batch_.add(part.dst, from, src.bytes);
      }
      for (const ChunkPart& part : parts) events_.make_stream_wait(stream_.get(), part.after);
      enqueued = true;
      batch_.enqueue(stream_.get());
      if (bounce != nullptr) SPMOE_CUDA_TRY(cudaEventRecord(bounce->copied.get(), stream_.get()));
      return {reinterpret_cast<std::uintptr_t>(record_arrival()), {}};
    } catch (const std::exception& error) {
      // Nobody waits for the parts that were enqueued.
      if (enqueued) static_cast<void>(cudaStreamSynchronize(stream_.get()));
      return {0, describe(error.what(), parts)};
    }
  }

  std::string finish() override {
    Event arrival = in_flight_.pop();
    const cudaError_t status = cudaEventSynchronize(arrival.get());
    free_.push_back(std::move(arrival));
    if (status == cudaSuccess) return {};
    static_cast<void>(cudaGetLastError());
    return "a copy to cuda:" + std::to_string(device_index_) +
           " failed in flight: " + cuda::describe(status);
  }

 private:
  /// A bounce buffer that nothing copies from any more.
  Bounce& next_bounce() {
    Bounce& next = ring_[next_bounce_++ % ring_.size()];
    SPMOE_CUDA_TRY(cudaEventSynchronize(next.copied.get()));
    return next;
  }

  cudaEvent_t record_arrival() {
    if (free_.empty()) free_.push_back(make_event(/*blocking=*/true));
    SPMOE_CUDA_TRY(cudaEventRecord(free_.back().get(), stream_.get()));
    in_flight_.push(std::move(free_.back()));
    free_.pop_back();
    return in_flight_[in_flight_.size() - 1].get();
  }

  [[nodiscard]] std::string describe(const char* error, std::span<const ChunkPart> parts) const {
    std::uint64_t bytes = 0;
    for (const ChunkPart& part : parts) bytes += part.src.bytes;
    return std::string{error} + ", copying " + format_bytes(bytes) +
           " to cuda:" + std::to_string(device_index_);
  }

  const int device_index_;
  ConsumerEvents& events_;
  const PinnedRanges& pinned_;
  const Stream stream_;
  std::vector<Bounce> ring_;
  std::size_t next_bounce_ = 0;
  BatchCopy batch_;
  Ring<Event> in_flight_;
  std::vector<Event> free_;
};

}  // namespace

void PinnedRanges::add(const std::byte* data, std::size_t bytes) {
  const std::scoped_lock lock{mutex_};
  bytes_.emplace(data, bytes);
}

void PinnedRanges::remove(const std::byte* data) noexcept {
  const std::scoped_lock lock{mutex_};
  bytes_.erase(data);
}

bool PinnedRanges::contains(const std::byte* data, std::size_t bytes) const {
  if (data == nullptr) return false;
  const std::scoped_lock lock{mutex_};
  const auto after = bytes_.upper_bound(data);
  if (after == bytes_.begin()) return false;
  const auto& [start, length] = *std::prev(after);
  return data + bytes <= start + length;
}

Movers::Movers(int device_index, std::uint64_t chunk_bytes, ConsumerEvents& events,
               const PinnedRanges& pinned)
    : device_index_{device_index},
      chunk_bytes_{chunk_bytes},
      bounce_bytes_{std::min(chunk_bytes, most_bounce_bytes)},
      events_{events},
      pinned_{pinned} {}

std::unique_ptr<ChunkMover> Movers::make_mover() {
  const CurrentDevice device{device_index_};
  return std::make_unique<Mover>(device_index_, bounce_bytes_, events_, pinned_);
}

std::size_t Movers::window(CopyPriority priority) const {
  return priority == CopyPriority::demand ? demand_window : prefetch_window;
}

bool Movers::is_pinned(const Extent& src) const {
  return src.data != nullptr && pinned_.contains(src.data + src.offset, src.bytes);
}

std::uint64_t Movers::part_bytes(const Extent& src) const {
  return is_pinned(src) ? chunk_bytes_ : bounce_bytes_;
}

void Movers::make_consumer_wait(std::uintptr_t consumer, std::uintptr_t arrival) {
  const CurrentDevice device{device_index_};  // whose default stream it is, if it is that
  SPMOE_CUDA_TRY(cudaStreamWaitEvent(reinterpret_cast<cudaStream_t>(consumer),
                                     reinterpret_cast<cudaEvent_t>(arrival), 0));
}

}  // namespace spmoe::cuda
