#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "device/device.hpp"

namespace spmoe {

/// A stretch of one copy, and what it must wait for on the device.
struct Move {
  CopyOp op;
  Mark after = 0;
};

/// A piece that a mover has begun.
struct BegunPiece {
  /// What a consumer may wait for until it has landed; 0 if it has.
  std::uintptr_t landing = 0;
  std::string error;  ///< why it did not begin, or failed; empty if it did
};

/// Moves pieces, one or several at a time. One thread.
class PieceMover {
 public:
  virtual ~PieceMover() = default;

  /// Begins a piece of one or more moves.
  [[nodiscard]] virtual BegunPiece begin(std::span<const Move> moves) = 0;

  /// Blocks until the oldest piece that is under way has ended: every one that began without an
  /// error. Returns what went wrong, empty if nothing.
  [[nodiscard]] virtual std::string finish() = 0;
};

/// How a device moves pieces. Thread-safe.
class PieceMovers {
 public:
  virtual ~PieceMovers() = default;

  /// For one thread of a pool.
  [[nodiscard]] virtual std::unique_ptr<PieceMover> make_mover() = 0;

  /// Pieces that a mover should have under way, so that the link never idles between two.
  [[nodiscard]] virtual std::size_t window(StreamPriority priority) const = 0;

  /// The most bytes of one move from there.
  [[nodiscard]] virtual std::uint64_t move_bytes(const Extent& src) const = 0;

  /// Whether a move from there may be of a piece with others.
  [[nodiscard]] virtual bool gathers(const Extent& src) const = 0;

  /// Later work on the stream `consumer` waits for a `BegunPiece::landing`. Nothing blocks.
  virtual void make_consumer_wait(std::uintptr_t consumer, std::uintptr_t landing) = 0;
};

}  // namespace spmoe
