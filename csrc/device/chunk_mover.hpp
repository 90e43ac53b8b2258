#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "base/types.hpp"

namespace spmoe {

/// The order of service on a busy link: demands first.
enum class CopyPriority : std::uint8_t { prefetch, demand };

/// A run of bytes of one copy, moved as part of a chunk.
struct ChunkPart {
  std::byte* dst;
  Extent src;
  EventId after = 0;  ///< the part waits for this event on the device
};

/// A chunk that a mover has begun.
struct BegunChunk {
  /// An event behind the chunk that a consumer may wait for on the device; 0 if there is none: only
  /// `ChunkMover::finish` says when the chunk has arrived.
  std::uintptr_t arrival = 0;
  std::string error;  ///< why the chunk did not begin, or failed later; empty: neither
};

/// Moves chunks, one or several at a time. One call at a time, from any thread. `begin` does not
/// wait for bytes that come from page-locked memory: a thread that submits a copy of such bytes may
/// call it itself.
class ChunkMover {
 public:
  using Clock = std::chrono::steady_clock;

  virtual ~ChunkMover() = default;

  /// Announces the chunk that `begin` gets next, of a copy that was submitted at `submitted`. Calls
  /// come in the order in which the engine cuts chunks, over all movers, one at a time, with the
  /// engine's lock held.
  virtual void reserve(std::uint64_t /*bytes*/, Clock::time_point /*submitted*/) {}

  /// Begins a chunk of one or more parts.
  [[nodiscard]] virtual BegunChunk begin(std::span<const ChunkPart> parts) = 0;

  /// Blocks until the oldest chunk in flight has arrived or failed; chunks that did not begin are
  /// not in flight. Returns what went wrong, empty if nothing.
  [[nodiscard]] virtual std::string finish() = 0;
};

/// How a device moves chunks: its own, or an adaptor around such (`PacedMovers`, `FaultyMovers`).
/// Thread-safe. Must be destroyed before the device.
class ChunkMovers {
 public:
  virtual ~ChunkMovers() = default;

  /// For one thread of a copy engine.
  [[nodiscard]] virtual std::unique_ptr<ChunkMover> make_mover() = 0;

  /// The most bytes of one chunk.
  [[nodiscard]] virtual std::uint64_t chunk_bytes() const = 0;

  /// Chunks that a mover should have in flight, so that the link never idles between two. Constant.
  [[nodiscard]] virtual std::size_t window(CopyPriority priority) const = 0;

  /// The most bytes of one part from there; at most `chunk_bytes`.
  [[nodiscard]] virtual std::uint64_t part_bytes(const Extent& src) const = 0;

  /// Whether a part from there may share a chunk with others.
  [[nodiscard]] virtual bool gathers(const Extent& src) const = 0;

  /// Later work on the stream `consumer` waits for a `BegunChunk::arrival`. Nothing blocks.
  virtual void make_consumer_wait(std::uintptr_t consumer, std::uintptr_t arrival) = 0;
};

}  // namespace spmoe
