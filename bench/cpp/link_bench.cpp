// How much of a device's link and memory do batches of copies and the kernels get, and do copies
// and compute overlap?
//
// `--device=host` (the default) or `cuda:<index>`. The peak of the link is one large copy, and that
// of the memory a copy within it, read and written bytes counted; both are measured first, and
// `of_peak` is a share of them. Every page is touched before. Keep the JSON with
// --benchmark_out=FILE.
//
//   copy/<size>/batch:<n>   n blobs handed over at once, until they have arrived
//   submit/batch:<n>        what a blob costs beside its bytes: blobs of 4 KiB
//   event                   one event on a stream of the consumer, and the wait for it
//   overlap/<shape>         copies and compute together; overlap is the share of the shorter of the
//                           two that the longer hides
//   ffn/<shape>/rows:<n>    one expert over n rows
//
// SPMOE_BENCH_MIB: bytes to rotate over (256); SPMOE_BENCH_THREADS: of the host's kernels (one a
// core).

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "base/convert.hpp"
#include "base/error.hpp"
#include "compute/cuda/cuda_layer_compute.hpp"
#include "compute/layer_compute.hpp"
#include "device/buffer.hpp"
#include "device/copy/copy_engine.hpp"
#include "device/make_device.hpp"

namespace spmoe {
namespace {

using Clock = std::chrono::steady_clock;

std::size_t setting(const char* name, std::size_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

std::size_t rotated_bytes() {
  return std::max<std::size_t>(1, setting("SPMOE_BENCH_MIB", 256)) << 20;
}

template <class Body>
double seconds_of(const Body& body) {
  const auto start = Clock::now();
  body();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Small numbers in bfloat16, in memory that the device reads by itself.
class PinnedBlobs {
 public:
  PinnedBlobs(Device& device, std::size_t bytes)
      : device_{device}, data_{device.allocate_pinned(bytes)}, bytes_{bytes} {
    auto* halves = reinterpret_cast<std::uint16_t*>(data_);
    for (std::size_t i = 0; i < bytes / 2; ++i) {
      halves[i] = float_to_bf16((static_cast<float>(i % 4093) - 2046.0F) * 1e-5F);
    }
  }
  PinnedBlobs(const PinnedBlobs&) = delete;
  PinnedBlobs& operator=(const PinnedBlobs&) = delete;
  ~PinnedBlobs() { device_.deallocate_pinned(data_, bytes_); }

  [[nodiscard]] Extent at(std::size_t offset, std::size_t bytes) const {
    return {data_ + offset, -1, 0, bytes};
  }

 private:
  Device& device_;
  std::byte* data_;
  std::size_t bytes_;
};

/// Blobs of one size that are copied in turn into places of their own.
class Copies {
 public:
  Copies(Device& device, std::size_t blob_bytes, std::size_t count)
      : blob_bytes_{blob_bytes},
        count_{count},
        source_{device, blob_bytes * count},
        place_{device, blob_bytes * count},
        engine_{make_movers(device, {}),
                static_cast<SlotIndex>(count),
                {},
                [this](const Completion& completion) { on_completion(completion); }} {
    for (std::size_t i = 0; i < count; ++i) {
      sources_.push_back(source_.at(i * blob_bytes_, blob_bytes_));
    }
    copy(count);
  }

  [[nodiscard]] const std::byte* place(std::size_t index) const {
    return place_.data() + index % count_ * blob_bytes_;
  }
  [[nodiscard]] std::size_t count() const { return count_; }

  /// Hands over the next `batch` blobs at once. Returns their number.
  std::size_t submit(std::size_t batch) {
    copies_.clear();
    for (std::size_t i = 0; i < batch; ++i, next_ = (next_ + 1) % count_) {
      copies_.push_back({static_cast<SlotIndex>(next_),
                         CopyPriority::demand,
                         place_.data() + next_ * blob_bytes_,
                         {&sources_[next_], 1},
                         0});
    }
    engine_.submit(copies_);
    return batch;
  }
  void wait(std::size_t batch) {
    std::unique_lock lock{mutex_};
    arrived_.wait(lock, [&] { return ended_ >= batch; });
    ended_ -= batch;
    if (!error_.empty()) throw DeviceError{"a copy failed: " + error_};
  }
  void copy(std::size_t batch) { wait(submit(std::min(batch, count_))); }

 private:
  void on_completion(const Completion& completion) {
    if (completion.outcome == Completion::Outcome::issued) return;
    const std::scoped_lock lock{mutex_};
    ++ended_;
    error_ += completion.error;
    arrived_.notify_all();
  }

  std::size_t blob_bytes_;
  std::size_t count_;
  std::size_t next_ = 0;
  PinnedBlobs source_;
  Buffer place_;
  std::vector<Extent> sources_;  // by slot
  std::vector<SlotCopy> copies_;
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::size_t ended_ = 0;  // and not waited for
  std::string error_;
  CopyEngine engine_;  // ends before its memory
};

/// The best rate of the device, in bytes a second.
struct Peaks {
  double link = 0;
  double memory = 0;
};

Peaks measure_peaks(Device& device) {
  const std::size_t bytes = rotated_bytes();
  Copies copies{device, bytes, 1};
  const Buffer other{device, bytes};
  const auto copy_within = [&] {
    device.wait(device.read_back(other.data(), copies.place(0), bytes, 0, HostWait::spin));
  };
  copy_within();
  Peaks peaks;
  for (int i = 0; i < 5; ++i) {
    const auto size = static_cast<double>(bytes);
    peaks.link = std::max(peaks.link, size / seconds_of([&] { copies.copy(1); }));
    peaks.memory = std::max(peaks.memory, 2 * size / seconds_of(copy_within));
  }
  return peaks;
}

void count_bytes(benchmark::State& state, double bytes, double seconds, double peak) {
  state.counters["bytes"] = benchmark::Counter(bytes, benchmark::Counter::kIsIterationInvariantRate,
                                               benchmark::Counter::kIs1000);
  state.counters["of_peak"] = bytes / seconds / peak;
}

void copy_bench(benchmark::State& state, Device& device, const Peaks& peaks, std::size_t bytes,
                std::size_t batch) {
  Copies copies{device, bytes, std::max(batch, rotated_bytes() / bytes)};
  double runs = 0;
  double seconds = 0;
  for (auto _ : state) {
    seconds += seconds_of([&] { copies.copy(batch); });
    ++runs;
  }
  count_bytes(state, static_cast<double>(bytes * batch), seconds / runs, peaks.link);
}

void submit_bench(benchmark::State& state, Device& device, std::size_t batch) {
  Copies copies{device, 4096, 1024};
  double blobs = 0;
  double handing_over = 0;
  double seconds = 0;
  for (auto _ : state) {
    handing_over += seconds_of([&] { copies.submit(batch); });
    seconds += seconds_of([&] { copies.wait(batch); });
    blobs += static_cast<double>(batch);
  }
  state.counters["submit_us_a_blob"] = handing_over / blobs * 1e6;
  state.counters["us_a_blob"] = (handing_over + seconds) / blobs * 1e6;
}

void event_bench(benchmark::State& state, Device& device) {
  for (auto _ : state) device.wait(device.record_event(0));
}

struct Shape {
  const char* name;
  BlobFormat format;
};

constexpr Shape shapes[] = {
    {"qwen3-30b-a3b", {.hidden = 2048, .inter = 768}},
    {"deepseek-v2-lite", {.hidden = 2048, .inter = 1408}},
    {"mixtral-8x7b", {.hidden = 4096, .inter = 14336}},
    {"gpt-oss-20b",
     {.hidden = 2880, .inter = 2880, .transposed = true, .interleaved = true, .has_bias = true}},
};

/// Experts of one shape on the device, and a layer that runs one of them at a time.
class Layer {
 public:
  Layer(Device& device, const BlobFormat& format, std::uint32_t rows)
      : device_{device},
        blobs_{device, (format.bytes() + 255) / 256 * 256,
               std::max<std::size_t>(2, rotated_bytes() / format.bytes())},
        x_{device, rows * format.hidden * 2, 1},
        weights_{device, rows * 2, 1},
        out_{device, rows * format.hidden * 2},
        rows_{rows} {
    const auto index = cuda_index(device.name());
    const auto threads = static_cast<unsigned>(setting("SPMOE_BENCH_THREADS", 0));
    compute_ = index ? make_cuda_layer_compute(format, {}, *index)
                     : make_host_layer_compute(format, {}, threads);
    for (std::uint32_t r = 0; r < rows; ++r) indices_.push_back(r);
  }

  [[nodiscard]] Copies& blobs() { return blobs_; }

  /// Enqueues the next expert; on the host it has run at the return.
  void enqueue() {
    LayerArgs args;
    args.tokens = rows_;
    args.k = 1;
    args.x = x_.place(0);
    args.x_dtype = DType::bf16;
    args.top_k_weights = weights_.place(0);
    args.weights_dtype = DType::bf16;
    args.out = out_.data();
    const ExpertTask task{blobs_.place(next_++), indices_, indices_};
    compute_->begin(args);
    compute_->run({&task, 1});
    compute_->end();
  }
  void finish() { device_.wait(device_.record_event(0)); }

 private:
  Device& device_;
  Copies blobs_, x_, weights_;
  Buffer out_;
  std::uint32_t rows_;
  std::size_t next_ = 0;
  std::vector<std::uint32_t> indices_;
  std::unique_ptr<LayerCompute> compute_;
};

void ffn_bench(benchmark::State& state, Device& device, const Peaks& peaks,
               const BlobFormat& format, std::uint32_t rows) {
  constexpr int experts = 16;  // enqueued at once, as layers are
  Layer layer{device, format, rows};
  double runs = 0;
  double seconds = 0;
  for (auto _ : state) {
    seconds += seconds_of([&] {
      for (int i = 0; i < experts; ++i) layer.enqueue();
      layer.finish();
    });
    ++runs;
  }
  count_bytes(state, static_cast<double>(format.bytes()) * experts, seconds / runs, peaks.memory);
}

void overlap_bench(benchmark::State& state, Device& device, const BlobFormat& format) {
  constexpr std::size_t blobs = 4;
  Layer layer{device, format, 4};
  Copies copies{device, format.bytes(), blobs};
  // So much compute that it takes about as long as the copies.
  const auto compute = [&](int experts) {
    for (int i = 0; i < experts; ++i) layer.enqueue();
    layer.finish();
  };
  compute(1);
  const double copy_s = seconds_of([&] { copies.copy(blobs); });
  const double expert_s = seconds_of([&] { compute(8); }) / 8;
  const int experts = static_cast<int>(std::clamp(copy_s / expert_s, 1.0, 10'000.0));
  double copying = 0;
  double computing = 0;
  double both = 0;
  for (auto _ : state) {
    copying += seconds_of([&] { copies.copy(blobs); });
    computing += seconds_of([&] { compute(experts); });
    both += seconds_of([&] {
      copies.submit(blobs);
      compute(experts);
      copies.wait(blobs);
    });
  }
  state.counters["copy_share"] = copying / (copying + computing);
  state.counters["overlap"] = (copying + computing - both) / std::min(copying, computing);
}

void register_all(Device& device, const Peaks& peaks) {
  const auto add = [](const std::string& name, auto body) {
    benchmark::RegisterBenchmark(name.c_str(), body)->UseRealTime();
  };
  const std::size_t largest = rotated_bytes();
  for (const std::size_t kib : {64U, 1024U, 9216U, 16896U, 49152U, 344064U}) {
    for (const std::size_t batch : {1U, 4U, 16U}) {
      const std::size_t bytes = kib << 10;
      if (bytes * batch > largest) continue;
      add("copy/" + std::to_string(kib) + "KiB/batch:" + std::to_string(batch),
          [&, bytes, batch](benchmark::State& s) { copy_bench(s, device, peaks, bytes, batch); });
    }
  }
  for (const std::size_t batch : {1U, 8U, 64U}) {
    add("submit/batch:" + std::to_string(batch),
        [&, batch](benchmark::State& s) { submit_bench(s, device, batch); });
  }
  add("event", [&](benchmark::State& s) { event_bench(s, device); });
  for (const Shape& shape : shapes) {
    if (2 * shape.format.bytes() > largest) continue;  // fewer would rest in a cache
    add(std::string{"overlap/"} + shape.name,
        [&](benchmark::State& s) { overlap_bench(s, device, shape.format); });
    for (const std::uint32_t rows : {1U, 2U, 4U, 8U, 16U, 32U}) {
      add(std::string{"ffn/"} + shape.name + "/rows:" + std::to_string(rows),
          [&, rows](benchmark::State& s) { ffn_bench(s, device, peaks, shape.format, rows); });
    }
  }
}

std::string in_gb(double bytes_a_second) { return std::to_string(bytes_a_second / 1e9) + " GB/s"; }

/// Takes `--device=NAME` out of the arguments.
std::string take_device(int& argc, char** argv) {
  constexpr std::string_view flag = "--device=";
  std::string name = "host";
  int kept = 1;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument{argv[i]};
    if (argument.starts_with(flag)) {
      name = argument.substr(flag.size());
    } else {
      argv[kept++] = argv[i];
    }
  }
  argc = kept;
  return name;
}

int run(int argc, char** argv) {
  const std::string name = take_device(argc, argv);
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  const auto device = make_device(name);
  const Peaks peaks = measure_peaks(*device);
  benchmark::AddCustomContext("device", std::string{device->name()});
  benchmark::AddCustomContext("link_peak", in_gb(peaks.link));
  benchmark::AddCustomContext("memory_peak", in_gb(peaks.memory));
  benchmark::AddCustomContext("compiler", __VERSION__);
  register_all(*device, peaks);
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}

}  // namespace
}  // namespace spmoe

int main(int argc, char** argv) {
  try {
    return spmoe::run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << "link_bench: " << error.what() << '\n';
    return 1;
  }
}
