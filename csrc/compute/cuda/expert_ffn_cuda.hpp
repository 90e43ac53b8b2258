#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "compute/cuda/ffn_launch.hpp"
#include "compute/layer_compute.hpp"

namespace spmoe::cuda {

/// The feed-forward of groups of experts, enqueued on a stream. Owns no memory. One thread.
/// The bits of an output row depend on its input row and its blob alone.
class ExpertFfn {
 public:
  /// A product of one expert is cut into about `wanted_blocks` blocks if its shape has so many: by
  /// default some rounds of them on the largest processors, so that the last round does not leave
  /// most of one idle. @throws InvalidArgument if a size is 0.
  ExpertFfn(const BlobFormat& format, ActivationParams activation,
            std::uint32_t wanted_blocks = 1024);

  /// Bytes of device memory that `run` works in, whatever it is given.
  [[nodiscard]] std::size_t scratch_bytes() const noexcept;

  /// Enqueues y[out_row] = down(act(gate(x)) * up(x)) for the rows of all `tasks`, reading token
  /// out_row / k of `args.x`, onto `args.consumer`. `scratch` is aligned to 256 bytes, all 0 before
  /// its first run and then left alone between runs, which follow each other on the device.
  /// @throws InvalidArgument if a task's row lists differ in size; then nothing was enqueued.
  /// @throws DeviceError
  void run(std::span<const ExpertTask> tasks, const LayerArgs& args, float* expert_out,
           std::byte* scratch);

  /// Enqueues the end of a layer: `LayerCompute::end` over the rows of `run`. @throws DeviceError
  void combine(const LayerArgs& args, const float* expert_out);

 private:
  void launch(ProductLaunch& table, unsigned groups, const LayerArgs& args, float* expert_out,
              std::byte* scratch);
  [[nodiscard]] std::size_t partial_floats() const noexcept;

  BlobFormat format_;
  ActivationParams activation_;
  Product gate_up_;
  Product down_;
};

}  // namespace spmoe::cuda
