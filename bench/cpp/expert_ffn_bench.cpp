// How close does the expert FFN come to reading its weights and doing nothing else?
//
// `read/...` sums the same bytes with as many threads; `ffn/...` runs experts over 1 to 8 rows.
// Both rotate over more weights than any cache holds, every page touched before. The counter
// `weights` is bytes of weights a second. Keep the JSON with --benchmark_out=FILE.
//
// SPMOE_BENCH_MIB: weights to rotate over (256); SPMOE_BENCH_THREADS: threads (one a core).

#include <benchmark/benchmark.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/convert.hpp"
#include "compute/expert_ffn.hpp"
#include "compute/host/host_kernel.hpp"
#include "compute/host/thread_team.hpp"

namespace spmoe {
namespace {

std::size_t setting(const char* name, std::size_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

unsigned thread_count() {
  const auto cores = std::max(1U, std::thread::hardware_concurrency());
  return static_cast<unsigned>(std::max<std::size_t>(1, setting("SPMOE_BENCH_THREADS", cores)));
}

std::string cpu_model() {
  std::ifstream info{"/proc/cpuinfo"};
  for (std::string line; std::getline(info, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

/// Experts of one shape with small random weights, one behind the other.
class Experts {
 public:
  explicit Experts(const BlobFormat& format)
      : format_{format},
        count_{std::max<std::size_t>(1, (setting("SPMOE_BENCH_MIB", 256) << 20) / format.bytes())},
        weights_(count_ * format.bytes() / sizeof(std::uint64_t)) {
    // Any pattern of moderate numbers will do; one block of them, repeated.
    std::mt19937 random{1};
    std::normal_distribution<float> normal{0.0F, 0.02F};
    std::vector<float> block(4093);
    std::ranges::generate(block, [&] { return normal(random); });
    const std::size_t size = size_of(format.dtype);
    auto* bytes = reinterpret_cast<std::byte*>(weights_.data());
    const std::size_t total = weights_.size() * sizeof(std::uint64_t) / size;
    for (std::size_t at = 0; at < total; at += block.size()) {
      narrow(block.data(), std::min(block.size(), total - at), format.dtype, bytes + at * size);
    }
  }

  [[nodiscard]] const BlobFormat& format() const { return format_; }

  /// The next expert in rotation.
  const std::byte* next() {
    next_ = (next_ + 1) % count_;
    return reinterpret_cast<const std::byte*>(weights_.data()) + next_ * format_.bytes();
  }

 private:
  BlobFormat format_;
  std::size_t count_;
  std::size_t next_ = 0;
  std::vector<std::uint64_t> weights_;
};

void count_weights(benchmark::State& state, const BlobFormat& format) {
  state.counters["weights"] = benchmark::Counter(static_cast<double>(format.bytes()),
                                                 benchmark::Counter::kIsIterationInvariantRate,
                                                 benchmark::Counter::kIs1000);
}

void read_bench(benchmark::State& state, Experts& experts) {
  ThreadTeam team{thread_count()};
  constexpr std::size_t words = 1 << 14;
  const std::size_t total = experts.format().bytes() / sizeof(std::uint64_t);
  std::atomic<std::uint64_t> sink{0};
  for (auto _ : state) {
    const auto* blob = reinterpret_cast<const std::uint64_t*>(experts.next());
    team.run(static_cast<std::uint32_t>((total + words - 1) / words),
             [&](std::uint32_t item, unsigned) {
               const std::size_t begin = item * words;
               const std::size_t end = std::min(begin + words, total);
               // Several sums: one chain of additions would be slower than the memory.
               std::array<std::uint64_t, 8> sums{};
               for (std::size_t i = begin; i + sums.size() <= end; i += sums.size()) {
                 for (std::size_t j = 0; j < sums.size(); ++j) sums[j] += blob[i + j];
               }
               sink.fetch_add(std::accumulate(sums.begin(), sums.end(), std::uint64_t{0}),
                              std::memory_order_relaxed);
             });
  }
  benchmark::DoNotOptimize(sink.load());
  count_weights(state, experts.format());
}

void ffn_bench(benchmark::State& state, Experts& experts, std::string_view isa,
               std::uint32_t rows) {
  const BlobFormat& format = experts.format();
  const auto ffn = make_host_expert_ffn(format, {}, thread_count(), isa);
  std::vector<std::uint32_t> indices(rows);
  for (std::uint32_t r = 0; r < rows; ++r) indices[r] = r;
  std::vector<float> x(std::size_t{rows} * format.hidden, 0.5F);
  std::vector<float> out(x.size());
  for (auto _ : state) {
    const ExpertTask task{experts.next(), indices, indices};
    ffn->run({&task, 1}, x.data(), out.data());
  }
  benchmark::DoNotOptimize(out.data());
  count_weights(state, format);
}

struct Shape {
  const char* name;
  BlobFormat format;
};

constexpr Shape shapes[] = {
    {"576x1536_bf16", {.hidden = 576, .inter = 1536}},
    {"2048x1408_bf16", {.hidden = 2048, .inter = 1408}},
    {"4096x14336_bf16", {.hidden = 4096, .inter = 14336}},
    {"2048x1408_f16", {.hidden = 2048, .inter = 1408, .dtype = DType::f16}},
    {"2048x1408_f32", {.hidden = 2048, .inter = 1408, .dtype = DType::f32}},
    {"2880x2880_bf16_gpt_oss",
     {.hidden = 2880, .inter = 2880, .transposed = true, .interleaved = true, .has_bias = true}},
};

/// Makes the weights when a benchmark of `shape` first runs, and drops those of the one before.
Experts& experts_of(const Shape& shape) {
  static std::unique_ptr<Experts> current;
  if (current == nullptr || current->format() != shape.format) {
    current.reset();
    current = std::make_unique<Experts>(shape.format);
  }
  return *current;
}

void register_all() {
  for (const Shape& shape : shapes) {
    const std::string name = shape.name;
    benchmark::RegisterBenchmark(("read/" + name).c_str(), [&shape](benchmark::State& state) {
      read_bench(state, experts_of(shape));
    })->UseRealTime();
    for (const HostKernel& kernel : host_kernels()) {
      if (!kernel.supported()) continue;
      for (const std::uint32_t rows : {1U, 2U, 4U, 5U, 8U}) {
        const std::string full =
            "ffn/" + name + "/" + std::string{kernel.name} + "/rows:" + std::to_string(rows);
        benchmark::RegisterBenchmark(full.c_str(), [&shape, &kernel, rows](benchmark::State& s) {
          ffn_bench(s, experts_of(shape), kernel.name, rows);
        })->UseRealTime();
      }
    }
  }
}

}  // namespace
}  // namespace spmoe

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::AddCustomContext("cpu", spmoe::cpu_model());
  benchmark::AddCustomContext("ffn_threads", std::to_string(spmoe::thread_count()));
  benchmark::AddCustomContext("compiler", __VERSION__);
  spmoe::register_all();
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
