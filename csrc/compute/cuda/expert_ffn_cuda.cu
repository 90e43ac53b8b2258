#include "compute/cuda/expert_ffn_cuda.hpp"

#include <algorithm>
#include <string>

#include "base/error.hpp"
#include "compute/cuda/ffn_kernels.cuh"

namespace spmoe::cuda {
namespace {

std::uint32_t ceil_div(std::uint32_t value, std::uint32_t divisor) {
  return (value + divisor - 1) / divisor;
}

void share_out(Product& product, std::uint32_t wanted_blocks) {
  product.chunk_count = ceil_div(product.inputs, chunk_inputs);
  product.tile_count = product.halves ? ceil_div(product.outputs / 2, tile_outputs / 2)
                                      : ceil_div(product.outputs, tile_outputs);
  product.split_count =
      std::clamp(ceil_div(wanted_blocks, product.tile_count), 1U, product.chunk_count);
}

std::size_t row_floats(const Product& product) {
  return std::size_t{product.split_count} * product.tile_count * tile_outputs;
}

bool is_aligned(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address) % sizeof(Quad) == 0;
}

using Kernel = void (*)(ProductLaunch);

template <DType kDtype, bool kTransposed, int kTerms>
Kernel kernel_for_rows(bool few) {
  return few ? multiply_rows<kDtype, kTransposed, 1, kTerms>
             : multiply_rows<kDtype, kTransposed, 4, kTerms>;
}

template <DType kDtype, int kTerms>
Kernel kernel_for_layout(bool transposed, bool few) {
  return transposed ? kernel_for_rows<kDtype, true, kTerms>(few)
                    : kernel_for_rows<kDtype, false, kTerms>(few);
}

/// A bfloat16 row is one term; it has kernels of its own where bfloat16 models need them.
Kernel kernel_for(const BlobFormat& format, DType x_dtype, bool few) {
  switch (format.dtype) {
    case DType::f32: return kernel_for_layout<DType::f32, 3>(format.transposed, few);
    case DType::f16: return kernel_for_layout<DType::f16, 3>(format.transposed, few);
    case DType::bf16: break;
  }
  return x_dtype == DType::bf16 ? kernel_for_layout<DType::bf16, 1>(format.transposed, few)
                                : kernel_for_layout<DType::bf16, 3>(format.transposed, few);
}

void check_rows(std::span<const ExpertTask> tasks) {
  for (std::size_t i = 0; i < tasks.size(); ++i) {
    if (tasks[i].token_rows.size() == tasks[i].out_rows.size()) continue;
    throw InvalidArgument{"task " + std::to_string(i) + " reads " +
                          std::to_string(tasks[i].token_rows.size()) + " rows but writes " +
                          std::to_string(tasks[i].out_rows.size()) +
                          "; give one output row per token row"};
  }
}

}  // namespace

ExpertFfn::ExpertFfn(const BlobFormat& format, ActivationParams activation,
                     std::uint32_t wanted_blocks)
    : format_{format},
      activation_{activation},
      gate_up_{.weight_offset = 0,
               .bias_offset = format.gate_up_bias_offset(),
               .inputs = format.hidden,
               .outputs = 2 * format.inter,
               .has_bias = format.has_bias,
               .gated = true,
               .halves = !format.interleaved},
      down_{.weight_offset = format.down_offset(),
            .bias_offset = format.down_bias_offset(),
            .inputs = format.inter,
            .outputs = format.hidden,
            .has_bias = format.has_bias} {
  if (format.hidden == 0 || format.inter == 0) {
    throw InvalidArgument{"an expert of hidden " + std::to_string(format.hidden) + " and inter " +
                          std::to_string(format.inter) + " has no weights; both must be above 0"};
  }
  share_out(gate_up_, wanted_blocks);
  share_out(down_, wanted_blocks);
}

std::size_t ExpertFfn::partial_floats() const noexcept {
  return max_launch_rows * std::max(row_floats(gate_up_), row_floats(down_));
}

std::size_t ExpertFfn::scratch_bytes() const noexcept {
  const std::size_t h_floats = std::size_t{max_launch_rows} * ceil_div(format_.inter, 8) * 8;
  const std::size_t arrivals =
      std::size_t{max_groups} * std::max(gate_up_.tile_count, down_.tile_count);
  return (partial_floats() + h_floats + arrivals) * sizeof(float);
}

void ExpertFfn::run(std::span<const ExpertTask> tasks, const LayerArgs& args, float* expert_out,
                    std::byte* scratch) {
  check_rows(tasks);
  ProductLaunch table{};
  std::uint32_t groups = 0;
  std::uint32_t rows = 0;
  const auto flush = [&] {
    if (groups != 0) launch(table, groups, args, expert_out, scratch);
    groups = rows = 0;
  };
  for (const ExpertTask& task : tasks) {
    for (std::size_t first = 0; first < task.out_rows.size(); first += max_group_rows) {
      const auto taken = task.out_rows.subspan(
          first, std::min<std::size_t>(task.out_rows.size() - first, max_group_rows));
      const auto count = static_cast<std::uint32_t>(taken.size());
      if (groups == max_groups || rows + count > max_launch_rows) flush();
      RowGroup& group = table.groups[groups++];
      group.blob = task.blob;
      group.row_count = count;
      group.first_row = rows;
      std::ranges::copy(taken, group.out_rows);
      rows += count;
    }
  }
  flush();
}

void ExpertFfn::launch(ProductLaunch& table, unsigned groups, const LayerArgs& args,
                       float* expert_out, std::byte* scratch) {
  const std::span used{table.groups, groups};
  const bool few =
      std::ranges::all_of(used, [](const RowGroup& group) { return group.row_count <= tile_rows; });
  // Rows of whole sixteens of bytes; in a transposed matrix a row has as many numbers as outputs.
  const bool even = format_.hidden % 8 == 0 && format_.inter % 8 == 0;
  const bool aligned_blobs = even && std::ranges::all_of(used, [](const RowGroup& group) {
                               return is_aligned(group.blob);
                             });
  auto* partial = reinterpret_cast<float*>(scratch);
  float* h = partial + partial_floats();
  const std::size_t h_floats = std::size_t{max_launch_rows} * ceil_div(format_.inter, 8) * 8;

  table.activation = activation_;
  table.aligned_blobs = aligned_blobs;
  table.partial = partial;
  table.arrivals = reinterpret_cast<std::uint32_t*>(h + h_floats);

  table.product = gate_up_;
  table.x = args.x;
  table.x_dtype = args.x_dtype;
  table.k = args.k;
  table.aligned_x = even && is_aligned(args.x);
  table.y = h;
  cuda::launch(kernel_for(format_, args.x_dtype, few),
               dim3{gate_up_.tile_count, gate_up_.split_count, groups}, block_threads,
               args.consumer, table);

  table.product = down_;
  table.x = h;
  table.x_dtype = DType::f32;
  table.k = 0;
  table.aligned_x = even;
  table.y = expert_out;
  cuda::launch(kernel_for(format_, DType::f32, few),
               dim3{down_.tile_count, down_.split_count, groups}, block_threads, args.consumer,
               table);
}

void ExpertFfn::combine(const LayerArgs& args, const float* expert_out) {
  if (args.tokens == 0) return;
  const CombineLaunch table{.tokens = args.tokens,
                            .k = args.k,
                            .hidden = format_.hidden,
                            .expert_out = expert_out,
                            .weights = args.top_k_weights,
                            .weights_dtype = args.weights_dtype,
                            .out = args.out,
                            .out_dtype = args.x_dtype};
  cuda::launch(combine_rows, dim3{args.tokens, ceil_div(format_.hidden, block_threads), 1},
               block_threads, args.consumer, table);
}

}  // namespace spmoe::cuda
