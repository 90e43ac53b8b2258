#pragma once

#include <cstdint>
#include <functional>

/// Runs the threads of a CUDA block as fibres of the calling thread, one block after the other.
/// A fibre runs until it waits for its warp or its block. Thread-safe: one grid runs at a time.
namespace spmoe::emulated {

struct Index {
  unsigned x = 0;
  unsigned y = 0;
  unsigned z = 0;
};

/// Runs `body` as every thread of every block of the grid. Aborts, saying so, if threads wait for
/// others that do not come.
void run_grid(Index grid, unsigned threads, const std::function<void()>& body);

[[nodiscard]] const Index& thread_index() noexcept;
[[nodiscard]] const Index& block_index() noexcept;

/// Waits for every thread of the block; true if `value` is in one.
bool any_of_block(bool value);

/// Value that a lane hands to its warp.
struct Operands {
  std::uint32_t a[4];
  std::uint32_t b[2];
};

/// Waits for the thread's warp. Returns what its 32 lanes handed over, by lane, which lasts until
/// the thread waits for its warp again.
[[nodiscard]] const Operands* exchange_in_warp(const Operands& own);

}  // namespace spmoe::emulated
