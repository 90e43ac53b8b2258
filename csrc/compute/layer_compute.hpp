#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "base/blob.hpp"
#include "compute/expert_ffn.hpp"

namespace spmoe {

/// The tensors that a MoE layer reads and writes, contiguous, owned by the caller. Addresses are of
/// the memory of the device that computes.
struct LayerArgs {
  std::uint32_t tokens = 0;
  std::uint32_t k = 0;      ///< experts that the router chooses for each token
  const void* x = nullptr;  ///< [tokens, hidden] of `x_dtype`
  DType x_dtype = DType::f32;
  const std::int64_t* top_k_index = nullptr;  ///< [tokens, k], for whoever groups the rows
  const void* top_k_weights = nullptr;        ///< [tokens, k] of `weights_dtype`
  DType weights_dtype = DType::f32;
  void* out = nullptr;          ///< [tokens, hidden] of `x_dtype`
  std::uintptr_t consumer = 0;  ///< the caller's stream, a cudaStream_t; the host ignores it
};

/// Computes a MoE layer in parts: `begin`, then `run` for groups of its experts in any order, then
/// `end`, or another `begin` that gives the layer up. On a device with streams all of it is
/// enqueued on the caller's stream, and nothing waits. One thread.
class LayerCompute {
 public:
  virtual ~LayerCompute() = default;

  /// As `ExpertFfn::name`.
  [[nodiscard]] virtual std::string_view name() const noexcept = 0;

  /// Takes `x` in. Everything that `args` points to must live, unchanged, until `end` has run.
  virtual void begin(const LayerArgs& args) = 0;

  /// Runs the rows of some experts. Row i of a task is token `token_rows[i]`, and output row
  /// token * k + place in its choices; each is written once. The spans need not outlive the call.
  virtual void run(std::span<const ExpertTask> tasks) = 0;

  /// out[t] = sum over k of top_k_weights[t, k] * the output row of (t, k), in fp32, in the order
  /// of k.
  virtual void end() = 0;
};

/// Over `make_host_expert_ffn`, whose arguments and errors it has.
std::unique_ptr<LayerCompute> make_host_layer_compute(const BlobFormat& format,
                                                      ActivationParams activation,
                                                      unsigned thread_count,
                                                      std::string_view isa = "auto");

}  // namespace spmoe
