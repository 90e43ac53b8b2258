#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "base/blob.hpp"

namespace spmoe {

/// One expert and the rows routed to it. Row i reads `x[token_rows[i]]` and writes
/// `out[out_rows[i]]`. No output row may appear twice in a run.
struct ExpertTask {
  const std::byte* blob;                      ///< `BlobFormat::bytes()` bytes, any alignment
  std::span<const std::uint32_t> token_rows;  ///< any number, none included
  std::span<const std::uint32_t> out_rows;    ///< same size as `token_rows`
};

/// Parameters of the activation; `alpha` and `limit` are read by `clamped_swiglu` alone.
struct ActivationParams {
  Activation kind = Activation::silu;
  float alpha = 1.702F;
  float limit = 7.0F;
};

/// Gated feed-forward of a group of experts over a few rows each. One thread calls.
/// The bits of an output row depend on its input row and its blob alone: not on the other rows,
/// the other experts, the number of threads, or the order of tasks.
class ExpertFfn {
 public:
  virtual ~ExpertFfn() = default;

  /// Instruction set or backend, for reports: "baseline", "avx2", "avx512", "cuda".
  [[nodiscard]] virtual std::string_view name() const noexcept = 0;

  /// out[out_row] = down(act(gate(x)) * up(x)) for every row of every task, fp32 accumulation.
  /// `x` is [tokens, hidden] and `out` [rows, hidden], both fp32, contiguous, apart. Blocks until
  /// done. Allocates nothing once it has seen the largest number of rows and of tasks.
  /// @throws InvalidArgument if a task's row lists differ in size; then nothing was written.
  virtual void run(std::span<const ExpertTask> tasks, const float* x, float* out) = 0;
};

/// The fastest host kernel that this processor runs, on `thread_count` threads (the caller's and
/// `thread_count - 1` of its own; 0 means one a core). `isa` forces one by name for tests.
/// @throws InvalidArgument if `isa` is unknown or this processor lacks it, if a size is 0, or if
///         `thread_count` is over 1024.
std::unique_ptr<ExpertFfn> make_host_expert_ffn(const BlobFormat& format,
                                                ActivationParams activation, unsigned thread_count,
                                                std::string_view isa = "auto");

}  // namespace spmoe
