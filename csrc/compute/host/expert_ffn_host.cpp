#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "base/convert.hpp"
#include "base/error.hpp"
#include "compute/expert_ffn.hpp"
#include "compute/host/gated_activation.hpp"
#include "compute/host/host_kernel.hpp"
#include "compute/host/thread_team.hpp"

namespace spmoe {
namespace {

constexpr unsigned max_threads = 1024;
constexpr std::size_t max_group_rows = 32;
constexpr std::size_t max_chunk = 256;
/// Chunks per thread and phase: enough that a thread which is held up gives its share away.
constexpr std::size_t chunks_per_thread = 8;

constexpr std::size_t ceil_div(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

/// Adds `count` bias values of the blob's dtype, which may lie at an odd address.
void add_bias(const std::byte* bias, DType dtype, std::size_t count, float* y) noexcept {
  for (std::size_t i = 0; i < count; ++i) {
    float value = 0;
    if (dtype == DType::f32) {
      std::memcpy(&value, bias + i * sizeof(value), sizeof(value));
    } else {
      std::uint16_t bits = 0;
      std::memcpy(&bits, bias + i * sizeof(bits), sizeof(bits));
      value = dtype == DType::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
    }
    y[i] += value;
  }
}

class HostExpertFfn final : public ExpertFfn {
 public:
  HostExpertFfn(const BlobFormat& format, ActivationParams activation, unsigned thread_count,
                const HostKernel& kernel)
      : format_{format},
        activation_{activation},
        name_{kernel.name},
        linear_{kernel.linear->get(format.dtype, format.transposed)},
        team_{thread_count},
        scratch_(thread_count * scratch_floats) {}

  std::string_view name() const noexcept override { return name_; }

  void run(std::span<const ExpertTask> tasks, const float* x, float* out) override {
    plan(tasks);
    for_chunks(tasks, format_.inter,
               [&](std::size_t t, std::size_t begin, std::size_t end, unsigned thread) {
                 gate_up(tasks[t], x, hidden_state(t), begin, end,
                         scratch_.data() + thread * scratch_floats);
               });
    for_chunks(tasks, format_.hidden,
               [&](std::size_t t, std::size_t begin, std::size_t end, unsigned) {
                 down(tasks[t], hidden_state(t), out, begin, end);
               });
  }

 private:
  static constexpr std::size_t scratch_floats = max_group_rows * 2 * max_chunk;

  /// One of the blob's two matrices.
  struct Matrix {
    std::size_t offset;
    std::size_t bias_offset;
    std::size_t inputs;
    std::size_t outputs;
  };

  using ReadRows = std::array<const float*, max_group_rows>;
  using WriteRows = std::array<float*, max_group_rows>;

  /// Places every task's activations behind each other; grows the workspace if it must.
  void plan(std::span<const ExpertTask> tasks) {
    first_row_.resize(tasks.size());
    std::size_t rows = 0;
    for (std::size_t t = 0; t < tasks.size(); ++t) {
      if (tasks[t].token_rows.size() != tasks[t].out_rows.size()) {
        throw InvalidArgument{"task " + std::to_string(t) + " reads " +
                              std::to_string(tasks[t].token_rows.size()) + " rows but writes " +
                              std::to_string(tasks[t].out_rows.size()) +
                              "; give one output row per token row"};
      }
      first_row_[t] = rows;
      rows += tasks[t].token_rows.size();
    }
    if (rows * format_.inter > hidden_states_.size()) hidden_states_.resize(rows * format_.inter);
  }

  float* hidden_state(std::size_t task) noexcept {
    return hidden_states_.data() + first_row_[task] * format_.inter;
  }

  /// Shares `outputs` of every task among the threads: body(task, begin, end, thread).
  template <class Body>
  void for_chunks(std::span<const ExpertTask> tasks, std::size_t outputs, const Body& body) {
    // A chunk of a transposed matrix reads a short run of each weight row: keep it a few lines.
    const std::size_t step = format_.transposed ? 64 : 16;
    const std::size_t fair = ceil_div(outputs * tasks.size(), team_.size() * chunks_per_thread);
    const std::size_t chunk =
        std::min(ceil_div(std::max<std::size_t>(fair, 1), step) * step, max_chunk);
    const std::size_t chunks = ceil_div(outputs, chunk);
    team_.run(static_cast<std::uint32_t>(tasks.size() * chunks),
              [&](std::uint32_t item, unsigned thread) {
                const std::size_t begin = item % chunks * chunk;
                body(item / chunks, begin, std::min(begin + chunk, outputs), thread);
              });
  }

  /// Outputs [begin, end) of `matrix`, bias included, for up to `max_group_rows` rows.
  void project(const std::byte* blob, const Matrix& matrix, std::size_t begin, std::size_t end,
               const ReadRows& x, const WriteRows& y, std::size_t rows) const noexcept {
    linear_({.weight = blob + matrix.offset,
             .inputs = matrix.inputs,
             .outputs = matrix.outputs,
             .first = begin,
             .last = end,
             .x = x.data(),
             .y = y.data(),
             .rows = rows});
    if (!format_.has_bias) return;
    const std::byte* bias = blob + matrix.bias_offset + begin * size_of(format_.dtype);
    for (std::size_t r = 0; r < rows; ++r) add_bias(bias, format_.dtype, end - begin, y[r]);
  }

  void gate_up(const ExpertTask& task, const float* x, float* hidden_state, std::size_t begin,
               std::size_t end, float* scratch) const noexcept {
    const Matrix matrix{.offset = 0,
                        .bias_offset = format_.gate_up_bias_offset(),
                        .inputs = format_.hidden,
                        .outputs = std::size_t{2} * format_.inter};
    const std::size_t count = end - begin;
    for (std::size_t first = 0; first < task.token_rows.size(); first += max_group_rows) {
      const std::size_t rows = std::min(task.token_rows.size() - first, max_group_rows);
      ReadRows from;
      WriteRows gate;
      WriteRows up;
      for (std::size_t r = 0; r < rows; ++r) {
        from[r] = x + std::size_t{task.token_rows[first + r]} * format_.hidden;
        gate[r] = scratch + r * 2 * max_chunk;
        up[r] = gate[r] + (format_.interleaved ? 1 : count);
      }
      if (format_.interleaved) {
        project(task.blob, matrix, 2 * begin, 2 * end, from, gate, rows);
      } else {
        project(task.blob, matrix, begin, end, from, gate, rows);
        project(task.blob, matrix, format_.inter + begin, format_.inter + end, from, up, rows);
      }
      for (std::size_t r = 0; r < rows; ++r) {
        apply_gate(activation_, gate[r], up[r], format_.interleaved ? 2 : 1, count,
                   hidden_state + (first + r) * format_.inter + begin);
      }
    }
  }

  void down(const ExpertTask& task, const float* hidden_state, float* out, std::size_t begin,
            std::size_t end) const noexcept {
    const Matrix matrix{.offset = format_.down_offset(),
                        .bias_offset = format_.down_bias_offset(),
                        .inputs = format_.inter,
                        .outputs = format_.hidden};
    for (std::size_t first = 0; first < task.out_rows.size(); first += max_group_rows) {
      const std::size_t rows = std::min(task.out_rows.size() - first, max_group_rows);
      ReadRows from;
      WriteRows to;
      for (std::size_t r = 0; r < rows; ++r) {
        from[r] = hidden_state + (first + r) * format_.inter;
        to[r] = out + std::size_t{task.out_rows[first + r]} * format_.hidden + begin;
      }
      project(task.blob, matrix, begin, end, from, to, rows);
    }
  }

  BlobFormat format_;
  ActivationParams activation_;
  std::string_view name_;
  LinearFn linear_;
  ThreadTeam team_;
  std::vector<float> scratch_;          // per thread, one chunk of gate and up
  std::vector<float> hidden_states_;    // [rows of all tasks, inter]
  std::vector<std::size_t> first_row_;  // per task, its first row in `hidden_states_`
};

const HostKernel& find_kernel(std::string_view isa) {
  std::string names = "auto";
  for (const HostKernel& kernel : host_kernels()) {
    if (kernel.supported()) names += ", " + std::string{kernel.name};
  }
  for (const HostKernel& kernel : host_kernels()) {
    if (isa == "auto" ? kernel.supported() : isa == kernel.name) {
      if (kernel.supported()) return kernel;
      throw InvalidArgument{"instruction set '" + std::string{isa} +
                            "' asked, but this processor lacks it; use one of: " + names};
    }
  }
  throw InvalidArgument{"instruction set '" + std::string{isa} +
                        "' asked, but this build has none of that name; use one of: " + names};
}

}  // namespace

std::unique_ptr<ExpertFfn> make_host_expert_ffn(const BlobFormat& format,
                                                ActivationParams activation, unsigned thread_count,
                                                std::string_view isa) {
  if (format.hidden == 0 || format.inter == 0) {
    throw InvalidArgument{"an expert of hidden " + std::to_string(format.hidden) + " and inter " +
                          std::to_string(format.inter) + " has no weights; both must be above 0"};
  }
  if (thread_count > max_threads) {
    throw InvalidArgument{"compute_threads is " + std::to_string(thread_count) +
                          "; give 0, which means one a core, to " + std::to_string(max_threads)};
  }
  if (thread_count == 0) thread_count = std::max(1U, std::thread::hardware_concurrency());
  return std::make_unique<HostExpertFfn>(format, activation, thread_count, find_kernel(isa));
}

}  // namespace spmoe
