#include "device/copy_pool.hpp"

#include <algorithm>
#include <utility>

namespace spmoe {
namespace {

// A piece of many small copies: enough that what one submission costs is little to each.
constexpr std::size_t max_moves = 64;

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

struct CopyPool::Batch {
  Channel* channel = nullptr;
  Fence fence = 0;
  StreamPriority priority = StreamPriority::demand;
  Mark after = 0;
  Clock::time_point submitted;
  std::vector<CopyOp> ops;  // of at least a byte each
  std::size_t next_op = 0;  // where the next piece begins
  std::uint64_t next_byte = 0;
  bool withdrawn = false;
  bool issued = false;                   // told
  std::uint32_t cut = 0;                 // moves that are about to begin
  std::uint32_t active = 0;              // moves under way, these included
  std::vector<std::uintptr_t> landings;  // of moves under way
  std::uint64_t bytes_moved = 0;
  std::uint64_t prefetched = 0;  // bytes of prefetches that had ended when it became a demand
  std::string error;

  [[nodiscard]] bool all_begun() const { return withdrawn || next_op == ops.size(); }
};

/// Moves that a thread begins together, all of one priority.
struct CopyPool::Piece {
  std::vector<Move> moves;
  std::vector<Batch*> batches;  // of each move
  StreamPriority priority = StreamPriority::demand;
  std::uint64_t bytes = 0;
  LinkPacer::Ticket ticket;
  BegunPiece begun;
};

CopyPool::Channel::~Channel() {
  std::unique_lock lock{pool_.mutex_};
  told_.wait(lock, [this] { return open_.empty(); });
}

CopyPool::CopyPool(PieceMovers& movers, const DeviceOptions& options)
    : movers_{movers},
      piece_bytes_{options.piece_bytes},
      // All threads may be at prefetches when a demand comes: together they hold it up by a piece.
      prefetch_piece_bytes_{std::max<std::uint64_t>(
          piece_bytes_ / (options.copy_threads * movers.window(StreamPriority::prefetch)), 1)},
      pacer_{options.link_gbps, options.faults} {
  for (unsigned i = 0; i < options.copy_threads; ++i) each_mover_.push_back(movers.make_mover());
  try {
    for (const auto& mover : each_mover_) {
      threads_.emplace_back([this, one = mover.get()] { serve(*one); });
    }
  } catch (...) {
    stop();
    throw;
  }
}

CopyPool::~CopyPool() { stop(); }

void CopyPool::stop() {
  {
    const std::scoped_lock lock{mutex_};
    stopping_ = true;
  }
  work_.notify_all();
  for (auto& thread : threads_) thread.join();
}

CopyPool::Batch& CopyPool::add(Channel& channel, const CopyBatch& copies) {
  if (free_.empty()) {
    free_.push_back(batches_.emplace_back(std::make_unique<Batch>()).get());
  }
  const auto now = Clock::now();
  if (!busy()) busy_from_ = now;
  Batch& batch = *free_.back();
  free_.pop_back();
  batch.channel = &channel;
  batch.fence = channel.next_++;
  batch.priority = channel.priority_;
  batch.after = copies.after;
  batch.submitted = now;
  batch.ops.clear();
  for (const CopyOp& op : copies.ops) {
    if (op.src.bytes > 0) batch.ops.push_back(op);
  }
  batch.next_op = 0;
  batch.next_byte = 0;
  batch.withdrawn = batch.issued = false;
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
  for (const CopyBatch& copies : batches) {
    Batch& batch = add(channel, copies);
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

BatchNotice CopyPool::next_notice(Channel& channel) {
  std::unique_lock lock{mutex_};
  channel.told_.wait(lock, [&] { return !channel.notices_.empty(); });
  return channel.notices_.pop();
}

void CopyPool::make_consumer_wait(Channel& channel, std::uintptr_t consumer, Fence fence) {
  const std::scoped_lock lock{mutex_};  // or a landing could be another piece's by now
  const auto found = std::ranges::find(channel.open_, fence, &Batch::fence);
  if (found == channel.open_.end()) return;
  for (const std::uintptr_t landing : (*found)->landings) {
    movers_.make_consumer_wait(consumer, landing);
  }
}

void CopyPool::inject(const LinkFaults& faults) {
  const std::scoped_lock lock{mutex_};
  pacer_.inject(faults);
}

LinkStats CopyPool::stats() const {
  const std::scoped_lock lock{mutex_};
  LinkStats now = stats_;
  if (busy()) now.busy_s += seconds_since(busy_from_);
  return now;
}

std::size_t CopyPool::window(StreamPriority priority) const {
  return pacer_.slows() ? 1 : movers_.window(priority);
}

CopyPool::Queue* CopyPool::startable(std::size_t under_way) {
  for (const StreamPriority priority : {StreamPriority::demand, StreamPriority::prefetch}) {
    if (!queue(priority).empty() && under_way < window(priority)) return &queue(priority);
  }
  return nullptr;
}

std::uint64_t CopyPool::cut_move(Batch& batch, std::uint64_t most_bytes, Piece& piece) {
  CopyOp op = batch.ops[batch.next_op];
  op.dst += batch.next_byte;
  op.src.offset += batch.next_byte;
  op.src.bytes = std::min(op.src.bytes - batch.next_byte, most_bytes);
  batch.next_byte += op.src.bytes;
  if (batch.next_byte == batch.ops[batch.next_op].src.bytes) {
    ++batch.next_op;
    batch.next_byte = 0;
  }
  if (batch.all_begun()) std::erase(queue(batch.priority), &batch);
  ++batch.cut;
  ++batch.active;
  if (piece.priority == StreamPriority::prefetch) {
    prefetch_started_ += op.src.bytes;
    prefetch_active_ += op.src.bytes;
  } else {
    stats_.prefetch_before_demand =
        std::max(stats_.prefetch_before_demand, prefetch_started_ - batch.prefetched);
  }
  piece.moves.push_back({op, batch.after});
  piece.batches.push_back(&batch);
  return op.src.bytes;
}

void CopyPool::cut_piece(Queue& queue, Piece& piece) {
  piece.moves.clear();
  piece.batches.clear();
  piece.priority = queue.front()->priority;
  piece.bytes = 0;
  const std::uint64_t most_bytes =
      piece.priority == StreamPriority::prefetch ? prefetch_piece_bytes_ : piece_bytes_;
  while (!queue.empty() && piece.bytes < most_bytes && piece.moves.size() < max_moves) {
    Batch& batch = *queue.front();
    const Extent& src = batch.ops[batch.next_op].src;
    const bool alone = pacer_.slows() || !movers_.gathers(src);
    if (alone && !piece.moves.empty()) break;
    piece.bytes +=
        cut_move(batch, std::min(most_bytes - piece.bytes, movers_.move_bytes(src)), piece);
    if (alone) break;
  }
  piece.ticket = pacer_.admit(piece.bytes, piece.batches.front()->submitted, Clock::now());
}

void CopyPool::serve(PieceMover& mover) {
  std::vector<Piece> pieces(
      std::max(movers_.window(StreamPriority::demand), movers_.window(StreamPriority::prefetch)));
  std::size_t oldest = 0;
  std::size_t under_way = 0;
  std::unique_lock lock{mutex_};
  while (true) {
    work_.wait(lock, [&] { return stopping_ || under_way > 0 || startable(0) != nullptr; });
    if (Queue* queue = startable(under_way)) {
      Piece& piece = pieces[(oldest + under_way) % pieces.size()];
      cut_piece(*queue, piece);
      lock.unlock();
      piece.begun = piece.ticket.fail ? BegunPiece{0, "read error injected by a test"}
                                      : mover.begin(piece.moves);
      lock.lock();
      note_begun(piece);
      if (piece.begun.error.empty()) {
        ++under_way;
      } else {
        finish(piece);
      }
    } else if (under_way > 0) {
      Piece& piece = pieces[oldest];
      lock.unlock();
      piece.begun.error = mover.finish();
      LinkPacer::hold(piece.ticket);
      lock.lock();
      finish(piece);
      oldest = (oldest + 1) % pieces.size();
      --under_way;
    } else {
      return;  // stopping, and everything submitted has been served
    }
  }
}

void CopyPool::note_begun(const Piece& piece) {
  const std::uintptr_t landing = piece.begun.landing;
  for (Batch* batch : piece.batches) {
    --batch->cut;
    if (landing == 0) continue;
    batch->landings.push_back(landing);
    const bool whole = batch->all_begun() && !batch->withdrawn && batch->cut == 0;
    if (!whole || batch->issued || !batch->error.empty() || pacer_.slows()) continue;
    batch->issued = true;
    batch->channel->notices_.push({batch->fence, BatchNotice::What::issued, 0, {}});
    batch->channel->told_.notify_all();
  }
}

void CopyPool::finish(Piece& piece) {
  const BegunPiece& begun = piece.begun;
  for (std::size_t i = 0; i < piece.moves.size(); ++i) {
    Batch& batch = *piece.batches[i];
    const std::uint64_t bytes = piece.moves[i].op.src.bytes;
    if (piece.priority == StreamPriority::prefetch) prefetch_active_ -= bytes;
    if (begun.error.empty()) {
      stats_.bytes += bytes;
      batch.bytes_moved += bytes;
    } else if (batch.error.empty()) {
      batch.error = begun.error;
    }
    const auto landing = std::ranges::find(batch.landings, begun.landing);
    if (landing != batch.landings.end()) batch.landings.erase(landing);
    --batch.active;
  }
  for (Batch* batch : piece.batches) {
    if (batch->active == 0) end_if_done(*batch);
  }
}

void CopyPool::end_if_done(Batch& batch) {
  if (batch.channel == nullptr || batch.active > 0 || !batch.all_begun()) return;
  using What = BatchNotice::What;
  const What what = !batch.error.empty() ? What::failed
                    : batch.withdrawn    ? What::withdrawn
                                         : What::landed;
  Channel& channel = *std::exchange(batch.channel, nullptr);
  channel.notices_.push({batch.fence, what, batch.bytes_moved, std::move(batch.error)});
  std::erase(channel.open_, &batch);
  free_.push_back(&batch);
  if (!busy()) stats_.busy_s += seconds_since(busy_from_);
  // Under the lock: once it is given up, the channel may go.
  channel.told_.notify_all();
}

}  // namespace spmoe
