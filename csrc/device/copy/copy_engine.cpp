#include "device/copy/copy_engine.hpp"

#include <algorithm>
#include <cmath>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "base/error.hpp"
#include "device/copy/faulty_movers.hpp"
#include "device/copy/paced_movers.hpp"
#include "device/device.hpp"

namespace spmoe {
namespace {

// A chunk of many small parts: enough that what one submission costs is little to each.
constexpr std::size_t max_parts = 64;

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

bool has_bytes(const Extent& extent) { return extent.bytes > 0; }

}  // namespace

void check(const CopyOptions& options) {
  constexpr unsigned most = CopyOptions::max_copy_threads;
  if (options.copy_threads == 0 || options.copy_threads > most) {
    throw InvalidArgument{"copy_threads is " + std::to_string(options.copy_threads) +
                          "; give 1 to " + std::to_string(most)};
  }
  const double gbps = options.link_gbps;
  if (gbps != 0 && (!std::isfinite(gbps) || gbps < CopyOptions::min_link_gbps)) {
    std::ostringstream message;
    message << "link_gbps is " << gbps << "; give 0 for a link that is not paced, or at least "
            << CopyOptions::min_link_gbps << " (10^9 bytes a second)";
    throw InvalidArgument{message.str()};
  }
}

std::unique_ptr<ChunkMovers> make_movers(Device& device, const CopyOptions& options) {
  check(options);
  auto movers = device.make_movers(options.chunk_bytes);
  if (options.link_gbps > 0) {
    movers = std::make_unique<PacedMovers>(std::move(movers), options.link_gbps);
  }
  if (options.faults != nullptr) {
    movers = std::make_unique<FaultyMovers>(std::move(movers), options.faults);
  }
  return movers;
}

struct CopyEngine::Copy {
  SlotCopy what;
  bool open = false;  // submitted and not ended
  CopyPriority priority = CopyPriority::demand;
  Clock::time_point submitted;
  std::span<const Extent> rest;  // to cut: of its first extent, from `next_byte` on
  std::uint64_t next_byte = 0;
  std::byte* next_dst = nullptr;
  bool cancelled = false;
  bool issued = false;
  std::uint32_t beginning = 0;           // parts that are cut and not begun
  std::uint32_t in_flight = 0;           // parts, these included
  std::vector<std::uintptr_t> arrivals;  // of parts in flight
  std::uint64_t bytes_moved = 0;
  std::uint64_t prefetched = 0;  // bytes of prefetches that had ended when it became a demand
  std::string error;

  [[nodiscard]] bool all_begun() const { return cancelled || rest.empty(); }
};

/// Parts that a thread begins together, all of one priority.
struct CopyEngine::Chunk {
  std::vector<ChunkPart> parts;
  std::vector<Copy*> copies;  // of each part
  CopyPriority priority = CopyPriority::demand;
  std::uint64_t bytes = 0;
  BegunChunk begun;
};

CopyEngine::CopyEngine(std::unique_ptr<ChunkMovers> movers, SlotIndex slot_count,
                       const CopyOptions& options, OnCompletion on_completion)
    : movers_{(check(options), std::move(movers))},
      chunk_bytes_{movers_->chunk_bytes()},
      // All threads may be at prefetches when a demand comes: together they hold it up by a chunk.
      prefetch_chunk_bytes_{std::max<std::uint64_t>(
          chunk_bytes_ / (options.copy_threads * movers_->window(CopyPriority::prefetch)), 1)},
      on_completion_{std::move(on_completion)},
      copies_(slot_count) {
  waiting_.reserve(slot_count);
  for (unsigned i = 0; i < options.copy_threads; ++i) each_mover_.push_back(movers_->make_mover());
  try {
    for (const auto& mover : each_mover_) {
      threads_.emplace_back([this, one = mover.get()] { serve(*one); });
    }
  } catch (...) {
    close();
    throw;
  }
}

CopyEngine::~CopyEngine() { close(); }

void CopyEngine::close() {
  {
    const std::scoped_lock lock{mutex_};
    closing_ = true;
  }
  work_.notify_all();
  for (auto& thread : threads_) thread.join();
  threads_.clear();
}

void CopyEngine::submit(std::span<const SlotCopy> copies) {
  if (copies.empty()) return;
  const std::scoped_lock lock{mutex_};
  for (const SlotCopy& what : copies) {
    if (copies_.at(what.slot).open || std::ranges::none_of(what.extents, has_bytes)) {
      throw std::logic_error{"CopyEngine::submit: slot " + std::to_string(what.slot) +
                             " has a copy that has not ended, or its new one has no byte"};
    }
  }
  const auto now = Clock::now();
  if (copies_open_ == 0) busy_from_ = now;
  for (const SlotCopy& what : copies) {
    Copy& copy = copies_[what.slot];
    copy.what = what;
    copy.open = true;
    copy.priority = what.priority;
    copy.submitted = now;
    copy.rest = what.extents;
    while (!has_bytes(copy.rest.front())) copy.rest = copy.rest.subspan(1);
    copy.next_byte = 0;
    copy.next_dst = what.dst;
    copy.cancelled = copy.issued = false;
    copy.bytes_moved = 0;
    enqueue(copy);
    ++copies_open_;
  }
  work_.notify_all();
}

void CopyEngine::enqueue(Copy& copy) {
  const auto behind = copy.priority == CopyPriority::prefetch
                          ? waiting_.end()
                          : std::ranges::find(waiting_, CopyPriority::prefetch, &Copy::priority);
  waiting_.insert(behind, &copy);
  copy.prefetched = prefetch_started_ - prefetch_in_flight_;
}

std::optional<Completion> CopyEngine::cancel(SlotIndex slot) {
  const std::scoped_lock lock{mutex_};
  Copy& copy = copies_.at(slot);
  if (!copy.open || copy.all_begun()) return std::nullopt;
  std::erase(waiting_, &copy);
  copy.cancelled = true;
  return copy.in_flight == 0 ? std::optional{end(copy)} : std::nullopt;
}

void CopyEngine::promote(SlotIndex slot) {
  const std::scoped_lock lock{mutex_};
  Copy& copy = copies_.at(slot);
  if (!copy.open || copy.all_begun() || copy.priority == CopyPriority::demand) return;
  std::erase(waiting_, &copy);
  copy.priority = CopyPriority::demand;
  enqueue(copy);
}

void CopyEngine::make_consumer_wait(std::uintptr_t consumer, SlotIndex slot) {
  const std::scoped_lock lock{mutex_};  // or an event could be another chunk's by now
  for (const std::uintptr_t arrival : copies_.at(slot).arrivals) {
    movers_->make_consumer_wait(consumer, arrival);
  }
}

LinkStats CopyEngine::stats() const {
  const std::scoped_lock lock{mutex_};
  LinkStats now = stats_;
  if (copies_open_ > 0) now.busy_s += seconds_since(busy_from_);
  return now;
}

bool CopyEngine::can_begin(std::size_t in_flight) const {
  return !waiting_.empty() && in_flight < movers_->window(waiting_.front()->priority);
}

std::uint64_t CopyEngine::cut_part(Copy& copy, std::uint64_t most_bytes, Chunk& chunk) {
  ChunkPart part{copy.next_dst, copy.rest.front(), copy.what.after};
  part.src.offset += copy.next_byte;
  part.src.bytes = std::min(part.src.bytes - copy.next_byte, most_bytes);
  const std::uint64_t bytes = part.src.bytes;
  copy.next_dst += bytes;
  copy.next_byte += bytes;
  while (!copy.rest.empty() && copy.next_byte == copy.rest.front().bytes) {
    copy.rest = copy.rest.subspan(1);
    copy.next_byte = 0;
  }
  if (copy.all_begun()) std::erase(waiting_, &copy);
  ++copy.beginning;
  ++copy.in_flight;
  if (chunk.priority == CopyPriority::prefetch) {
    prefetch_started_ += bytes;
    prefetch_in_flight_ += bytes;
  } else {
    stats_.prefetch_before_demand =
        std::max(stats_.prefetch_before_demand, prefetch_started_ - copy.prefetched);
  }
  chunk.parts.push_back(part);
  chunk.copies.push_back(&copy);
  return bytes;
}

void CopyEngine::cut(Chunk& chunk) {
  chunk.parts.clear();
  chunk.copies.clear();
  chunk.priority = waiting_.front()->priority;
  chunk.bytes = 0;
  const std::uint64_t most_bytes =
      chunk.priority == CopyPriority::prefetch ? prefetch_chunk_bytes_ : chunk_bytes_;
  while (!waiting_.empty() && waiting_.front()->priority == chunk.priority &&
         chunk.bytes < most_bytes && chunk.parts.size() < max_parts) {
    Copy& copy = *waiting_.front();
    Extent src = copy.rest.front();
    const bool alone = !movers_->gathers(src);
    if (alone && !chunk.parts.empty()) break;
    chunk.bytes +=
        cut_part(copy, std::min(most_bytes - chunk.bytes, movers_->part_bytes(src)), chunk);
    if (alone) break;
  }
}

void CopyEngine::serve(ChunkMover& mover) {
  std::vector<Chunk> chunks(
      std::max(movers_->window(CopyPriority::demand), movers_->window(CopyPriority::prefetch)));
  std::size_t oldest = 0;
  std::size_t in_flight = 0;
  std::vector<Completion> completions;  // to call back for
  completions.reserve(max_parts);
  std::unique_lock lock{mutex_};
  while (true) {
    work_.wait(lock, [&] { return closing_ || in_flight > 0 || can_begin(0); });
    if (can_begin(in_flight)) {
      Chunk& chunk = chunks[(oldest + in_flight) % chunks.size()];
      cut(chunk);
      mover.reserve(chunk.bytes, chunk.copies.front()->submitted);
      lock.unlock();
      chunk.begun = mover.begin(chunk.parts);
      lock.lock();
      note_begun(chunk, completions);
      if (chunk.begun.error.empty()) {
        ++in_flight;
      } else {
        note_finished(chunk, completions);
      }
    } else if (in_flight > 0) {
      Chunk& chunk = chunks[oldest];
      lock.unlock();
      chunk.begun.error = mover.finish();
      lock.lock();
      note_finished(chunk, completions);
      oldest = (oldest + 1) % chunks.size();
      --in_flight;
    } else {
      return;  // closing, and no copy waits
    }
    if (completions.empty()) continue;
    lock.unlock();
    for (const Completion& completion : completions) on_completion_(completion);
    completions.clear();
    lock.lock();
  }
}

void CopyEngine::note_begun(const Chunk& chunk, std::vector<Completion>& completions) {
  const std::uintptr_t arrival = chunk.begun.arrival;
  for (Copy* copy : chunk.copies) {
    --copy->beginning;
    if (arrival == 0) continue;
    copy->arrivals.push_back(arrival);
    const bool whole = copy->all_begun() && !copy->cancelled && copy->beginning == 0;
    if (!whole || copy->issued || !copy->error.empty()) continue;
    copy->issued = true;  // this chunk is in flight until the callback has returned, so it is first
    completions.push_back(
        {copy->what.slot, Completion::Outcome::issued, 0, std::string{}, copy->submitted});
  }
}

void CopyEngine::note_finished(const Chunk& chunk, std::vector<Completion>& completions) {
  const BegunChunk& begun = chunk.begun;
  for (std::size_t i = 0; i < chunk.parts.size(); ++i) {
    Copy& copy = *chunk.copies[i];
    const std::uint64_t bytes = chunk.parts[i].src.bytes;
    if (chunk.priority == CopyPriority::prefetch) prefetch_in_flight_ -= bytes;
    if (begun.error.empty()) {
      stats_.bytes += bytes;
      copy.bytes_moved += bytes;
    } else if (copy.error.empty()) {
      copy.error = begun.error;
    }
    const auto arrival = std::ranges::find(copy.arrivals, begun.arrival);
    if (arrival != copy.arrivals.end()) copy.arrivals.erase(arrival);
    --copy.in_flight;
  }
  for (Copy* copy : chunk.copies) {
    if (copy->open && copy->in_flight == 0 && copy->all_begun()) completions.push_back(end(*copy));
  }
}

Completion CopyEngine::end(Copy& copy) {
  using Outcome = Completion::Outcome;
  copy.open = false;
  if (--copies_open_ == 0) stats_.busy_s += seconds_since(busy_from_);
  const Outcome outcome = !copy.error.empty() ? Outcome::failed
                          : copy.cancelled    ? Outcome::cancelled
                                              : Outcome::arrived;
  return {copy.what.slot, outcome, copy.bytes_moved, std::exchange(copy.error, {}), copy.submitted};
}

}  // namespace spmoe
