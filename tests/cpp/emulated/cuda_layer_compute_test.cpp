// The streams and the memory of CudaLayerCompute, over the fake CUDA runtime.
#include "compute/cuda/cuda_layer_compute.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <functional>
#include <numeric>
#include <vector>

#include "base/error.hpp"
#include "device/cuda/handle.hpp"
#include "fake_cuda.hpp"
#include "message_of.hpp"
#include "random_expert.hpp"

namespace spmoe {
namespace {

using fake_cuda::Session;

constexpr BlobFormat shape{.hidden = 24, .inter = 16};
constexpr std::uint32_t k = 2;

/// Memory of the device, which the fake keeps where the host can reach it.
class DeviceFloats {
 public:
  explicit DeviceFloats(std::size_t count) {
    void* data = nullptr;
    SPMOE_CUDA_TRY(cudaMalloc(&data, count * sizeof(float)));
    floats = {static_cast<float*>(data), count};
  }
  DeviceFloats(const DeviceFloats&) = delete;
  DeviceFloats& operator=(const DeviceFloats&) = delete;
  ~DeviceFloats() { static_cast<void>(cudaFree(floats.data())); }

  std::span<float> floats;
};

/// One call of a layer of two experts: every token chooses both.
struct Call {
  explicit Call(std::uint32_t token_count, cudaStream_t on = nullptr)
      : tokens{token_count},
        x{tokens * shape.hidden},
        weights{tokens * k},
        out{tokens * shape.hidden},
        stream{on} {
    std::mt19937 random{token_count};
    std::normal_distribution<float> normal;
    std::ranges::generate(x.floats, [&] { return normal(random); });
    std::ranges::generate(weights.floats, [&] { return normal(random); });
    for (std::uint32_t t = 0; t < tokens; ++t) {
      token_rows.push_back(t);
      for (std::uint32_t e = 0; e < k; ++e) out_rows[e].push_back(t * k + e);
    }
  }
  [[nodiscard]] LayerArgs args() const {
    LayerArgs args;
    args.tokens = tokens;
    args.k = k;
    args.x = x.floats.data();
    args.top_k_weights = weights.floats.data();
    args.out = out.floats.data();
    args.consumer = reinterpret_cast<std::uintptr_t>(stream);
    return args;
  }

  std::uint32_t tokens;
  DeviceFloats x, weights, out;
  cudaStream_t stream;
  std::vector<std::uint32_t> token_rows;
  std::array<std::vector<std::uint32_t>, k> out_rows;
};

class CudaLayers : public ::testing::Test {
 protected:
  void compute(LayerCompute& layers, const Call& call) {
    layers.begin(call.args());
    for (std::uint32_t e = 0; e < k; ++e) run(layers, call, e);
    layers.end();
  }
  void run(LayerCompute& layers, const Call& call, std::uint32_t expert) {
    const ExpertTask task{blobs_[expert].data(), call.token_rows, call.out_rows[expert]};
    layers.run({&task, 1});
  }
  /// Waits for the call, and holds it against the host's.
  void expect_right(const Call& call) {
    SPMOE_CUDA_TRY(cudaStreamSynchronize(call.stream));
    std::vector<float> wanted(call.out.floats.size());
    const auto host = make_host_layer_compute(shape, {}, 1, "baseline");
    LayerArgs args = call.args();
    args.out = wanted.data();
    host->begin(args);
    for (std::uint32_t e = 0; e < k; ++e) run(*host, call, e);
    host->end();
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      ASSERT_NEAR(call.out.floats[i], wanted[i], 1e-5) << call.tokens << " tokens at " << i;
    }
  }

  Session session_{{.memory_bytes = std::size_t{1} << 26, .max_delay_us = 300}};
  const std::array<std::vector<std::byte>, k> blobs_{RandomExpert{shape, 1}.bytes,
                                                     RandomExpert{shape, 2}.bytes};
  const cuda::Stream a_ = cuda::make_stream();
  const cuda::Stream b_ = cuda::make_stream();
};

TEST_F(CudaLayers, are_right_on_any_stream_and_as_they_grow) {
  const auto layers = make_cuda_layer_compute(shape, {}, 0);
  EXPECT_EQ(layers->name(), "cuda");
  std::vector<std::unique_ptr<Call>> calls;
  for (const std::uint32_t tokens : {1U, 3U, 2U, 40U, 5U, 70U}) {
    const cuda::Stream& stream = calls.size() % 2 == 0 ? a_ : b_;
    calls.push_back(std::make_unique<Call>(tokens, stream.get()));
    compute(*layers, *calls.back());
  }
  for (const auto& call : calls) expect_right(*call);
}

TEST_F(CudaLayers, never_block_the_host) {
  const auto layers = make_cuda_layer_compute(shape, {}, 0);
  const Call small{2, a_.get()};
  const Call large{9, b_.get()};
  const auto waits = [&] {
    return session_.calls("cudaStreamSynchronize") + session_.calls("cudaEventSynchronize") +
           session_.calls("cudaFree") + session_.calls("cudaMalloc");
  };
  const std::uint64_t before = waits();
  compute(*layers, small);
  compute(*layers, large);
  EXPECT_EQ(waits(), before);
  expect_right(large);
}

TEST_F(CudaLayers, may_be_given_up_for_a_layer_on_another_stream) {
  const auto layers = make_cuda_layer_compute(shape, {}, 0);
  const Call given_up{4, a_.get()};
  const Call next{9, b_.get()};
  layers->begin(given_up.args());
  run(*layers, given_up, 0);
  compute(*layers, next);
  expect_right(next);

  const Call larger{20, a_.get()};
  layers->begin(larger.args());  // grows, and does no more
  compute(*layers, next);
  expect_right(next);
}

TEST_F(CudaLayers, would_be_caught_if_streams_did_not_wait_for_each_other) {
  const auto layers = make_cuda_layer_compute(shape, {}, 0);
  const Call first{4, a_.get()};
  const Call second{4, b_.get()};
  session_.forget(Session::Wait::of_stream, [](cudaStream_t) { return true; });
  compute(*layers, first);
  compute(*layers, second);
  SPMOE_CUDA_TRY(cudaStreamSynchronize(a_.get()));
  SPMOE_CUDA_TRY(cudaStreamSynchronize(b_.get()));
  EXPECT_FALSE(session_.take_violations().empty());
}

TEST_F(CudaLayers, name_the_launch_that_failed_and_go_on) {
  const auto layers = make_cuda_layer_compute(shape, {}, 0);
  const Call call{3, a_.get()};
  session_.fail("cudaLaunchKernel", 1, cudaErrorLaunchFailure);
  const std::string message = message_of<DeviceError>([&] { compute(*layers, call); });
  EXPECT_NE(message.find("cudaErrorLaunchFailure"), std::string::npos) << message;
  compute(*layers, call);
  expect_right(call);
}

TEST_F(CudaLayers, say_what_memory_was_asked_and_is_free) {
  const auto layers = make_cuda_layer_compute(shape, {}, 0);
  session_.fail("cudaMallocAsync", 1, cudaErrorMemoryAllocation);
  const Call call{3, a_.get()};
  const std::string message = message_of<OutOfMemory>([&] { layers->begin(call.args()); });
  EXPECT_TRUE(message.starts_with("no memory for 576 bytes of rows on cuda:0: ")) << message;
  EXPECT_TRUE(message.ends_with("; lower expert_memory, or give fewer tokens")) << message;
  compute(*layers, call);
  expect_right(call);
}

TEST_F(CudaLayers, refuse_a_device_that_is_not_there) {
  EXPECT_EQ(
      message_of<DeviceError>([] { static_cast<void>(make_cuda_layer_compute(shape, {}, 3)); }),
      "cuda:3 asked, but there are 1 CUDA devices, from cuda:0");
}

}  // namespace
}  // namespace spmoe
