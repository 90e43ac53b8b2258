#include "device/copy_pool.hpp"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

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

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

struct CopyPool::Batch {
  Channel* channel = nullptr;
  Fence fence = 0;
  StreamPriority priority = StreamPriority::demand;
  std::vector<CopyOp> ops;  // of at least a byte each
  std::size_t next_op = 0;  // where the next piece begins
  std::uint64_t next_byte = 0;
  bool withdrawn = false;
  std::uint32_t active = 0;  // pieces under way
  std::uint64_t bytes_moved = 0;
  std::uint64_t prefetched = 0;  // bytes of prefetches that had ended when it became a demand
  std::string error;

  [[nodiscard]] bool all_begun() const { return withdrawn || next_op == ops.size(); }
};

CopyPool::Channel::~Channel() {
  std::unique_lock lock{pool_.mutex_};
  ended_.wait(lock, [this] { return open_.empty(); });
}

CopyPool::CopyPool(const HostDeviceOptions& options)
    : piece_bytes_{options.piece_bytes},
      // All threads may be at a prefetch when a demand comes: together they hold it up by a piece.
      prefetch_piece_bytes_{std::max<std::uint64_t>(piece_bytes_ / options.copy_threads, 1)},
      pacer_{options.link_gbps, options.faults} {
  for (unsigned i = 0; i < options.copy_threads; ++i) threads_.emplace_back([this] { serve(); });
}

CopyPool::~CopyPool() {
  {
    const std::scoped_lock lock{mutex_};
    stopping_ = true;
  }
  work_.notify_all();
  for (auto& thread : threads_) thread.join();
}

CopyPool::Batch& CopyPool::add(Channel& channel, CopyBatch ops) {
  if (free_.empty()) {
    free_.push_back(batches_.emplace_back(std::make_unique<Batch>()).get());
  }
  Batch& batch = *free_.back();
  free_.pop_back();
  batch.channel = &channel;
  batch.fence = channel.next_++;
  batch.priority = channel.priority_;
  batch.ops.clear();
  for (const CopyOp& op : ops) {
    if (op.src.bytes > 0) batch.ops.push_back(op);
  }
  batch.next_op = 0;
  batch.next_byte = 0;
  batch.withdrawn = false;
  batch.bytes_moved = 0;
  batch.prefetched = prefetch_started_ - prefetch_active_;
  batch.error.clear();
  channel.open_.push_back(&batch);
  return batch;
}

Fence CopyPool::submit(Channel& channel, std::span<const CopyBatch> batches) {
  const std::scoped_lock lock{mutex_};
  const Fence first = channel.next_;
  bool waits = false;
  for (const CopyBatch ops : batches) {
    Batch& batch = add(channel, ops);
    if (!batch.all_begun()) {
      queue(channel.priority_).push_back(&batch);
      waits = true;
    }
    end_if_done(batch);  // one without a byte
  }
  if (waits) work_.notify_all();
  return first;
}

CopyPool::Batch* CopyPool::find_waiting(Channel& channel, Fence fence) {
  const auto found = std::ranges::find(channel.open_, fence, &Batch::fence);
  return found == channel.open_.end() || (*found)->all_begun() ? nullptr : *found;
}

void CopyPool::withdraw(Channel& channel, Fence fence) {
  const std::scoped_lock lock{mutex_};
  Batch* batch = find_waiting(channel, fence);
  if (batch == nullptr) return;
  std::erase(queue(batch->priority), batch);
  batch->withdrawn = true;
  end_if_done(*batch);
}

void CopyPool::promote(Channel& channel, Fence fence) {
  const std::scoped_lock lock{mutex_};
  Batch* batch = find_waiting(channel, fence);
  if (batch == nullptr || batch->priority == StreamPriority::demand) return;
  std::erase(queue(batch->priority), batch);
  batch->priority = StreamPriority::demand;
  batch->prefetched = prefetch_started_ - prefetch_active_;
  queue(batch->priority).push_back(batch);
}

BatchEnd CopyPool::next_end(Channel& channel) {
  std::unique_lock lock{mutex_};
  channel.ended_.wait(lock, [&] { return !channel.ends_.empty(); });
  return channel.ends_.pop();
}

void CopyPool::inject(const LinkFaults& faults) {
  const std::scoped_lock lock{mutex_};
  pacer_.inject(faults);
}

LinkStats CopyPool::stats() const {
  const std::scoped_lock lock{mutex_};
  LinkStats now = stats_;
  if (active_ > 0) now.busy_s += seconds_since(busy_from_);
  return now;
}

CopyPool::Batch* CopyPool::waiting() {
  for (const StreamPriority priority : {StreamPriority::demand, StreamPriority::prefetch}) {
    if (!queue(priority).empty()) return queue(priority).front();
  }
  return nullptr;
}

CopyPool::Piece CopyPool::begin_piece(Batch& batch) {
  const bool prefetch = batch.priority == StreamPriority::prefetch;
  CopyOp op = batch.ops[batch.next_op];
  op.dst += batch.next_byte;
  op.src.offset += batch.next_byte;
  op.src.bytes =
      std::min(op.src.bytes - batch.next_byte, prefetch ? prefetch_piece_bytes_ : piece_bytes_);
  batch.next_byte += op.src.bytes;
  if (batch.next_byte == batch.ops[batch.next_op].src.bytes) {
    ++batch.next_op;
    batch.next_byte = 0;
  }
  if (batch.all_begun()) std::erase(queue(batch.priority), &batch);
  ++batch.active;
  if (prefetch) {
    prefetch_started_ += op.src.bytes;
    prefetch_active_ += op.src.bytes;
  } else {
    stats_.prefetch_before_demand =
        std::max(stats_.prefetch_before_demand, prefetch_started_ - batch.prefetched);
  }
  return {op, &batch, batch.priority};
}

void CopyPool::serve() {
  std::unique_lock lock{mutex_};
  while (true) {
    work_.wait(lock, [this] { return stopping_ || waiting() != nullptr; });
    Batch* batch = waiting();
    if (batch == nullptr) return;  // stopping, and everything submitted has been served
    if (active_++ == 0) busy_from_ = Clock::now();
    const Piece piece = begin_piece(*batch);
    const auto ticket = pacer_.admit(piece.op.src.bytes);
    lock.unlock();
    std::string error = ticket.fail ? "read error injected by a test" : copy_piece(piece.op);
    LinkPacer::hold(ticket);
    lock.lock();
    if (--active_ == 0) stats_.busy_s += seconds_since(busy_from_);
    finish(piece, std::move(error));
  }
}

void CopyPool::finish(const Piece& piece, std::string error) {
  const std::uint64_t bytes = piece.op.src.bytes;
  if (piece.priority == StreamPriority::prefetch) prefetch_active_ -= bytes;
  Batch& batch = *piece.batch;
  if (error.empty()) {
    stats_.bytes += bytes;
    batch.bytes_moved += bytes;
  } else if (batch.error.empty()) {
    batch.error = std::move(error);
  }
  --batch.active;
  end_if_done(batch);
}

void CopyPool::end_if_done(Batch& batch) {
  if (batch.active > 0 || !batch.all_begun()) return;
  using How = BatchEnd::How;
  const How how = !batch.error.empty() ? How::failed
                  : batch.withdrawn    ? How::withdrawn
                                       : How::landed;
  Channel& channel = *batch.channel;
  channel.ends_.push({batch.fence, how, batch.bytes_moved, std::move(batch.error)});
  std::erase(channel.open_, &batch);
  free_.push_back(&batch);
  // Under the lock: once it is given up, the channel may go.
  channel.ended_.notify_all();
}

}  // namespace spmoe
