// The CUDA kernels on a GPU, against the host's; `emulated` holds what needs none.
#include "compute/cuda/cuda_layer_compute.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "device/buffer.hpp"
#include "device/copy/copy_engine.hpp"
#include "device/cuda/cuda_device.hpp"
#include "expert_layouts.hpp"
#include "random_expert.hpp"

namespace spmoe {
namespace {

/// The most by which results differ whose sums have another order, last rounding included.
float rounding_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return 2e-5F;
    case DType::f16: return 1e-3F;
    case DType::bf16: return 8e-3F;
  }
  return 0;
}

class CudaLayerCompute : public ::testing::TestWithParam<std::tuple<DType, Layout>> {
 protected:
  void SetUp() override {
    const CudaStatus status = cuda_status();
    if (status.device_count > 0) {
      device_ = make_cuda_device(0);
      return;
    }
    const char* required = std::getenv("REQUIRE_CUDA");
    if (required != nullptr && std::string{required} == "1") FAIL() << status.reason;
    GTEST_SKIP() << status.reason;
  }

  /// Device memory with a copy of `bytes` in it.
  std::unique_ptr<Buffer> place(const void* bytes, std::size_t count) {
    auto buffer = std::make_unique<Buffer>(*device_, count);
    const Extent source{static_cast<const std::byte*>(bytes), -1, 0, count};
    const SlotCopy copy{0, CopyPriority::demand, buffer->data(), {&source, 1}, 0};
    CopyEngine engine{make_movers(*device_, {}), 1, {}, [](const Completion& completion) {
                        EXPECT_NE(completion.outcome, Completion::Outcome::failed)
                            << completion.error;
                      }};
    engine.submit({&copy, 1});
    engine.close();
    return buffer;
  }

  std::vector<std::byte> read(const Buffer& buffer) {
    std::byte* pinned = device_->allocate_pinned(buffer.bytes());
    device_->wait(device_->read_back(pinned, buffer.data(), buffer.bytes(), 0, HostWait::sleep));
    std::vector<std::byte> bytes{pinned, pinned + buffer.bytes()};
    device_->deallocate_pinned(pinned, buffer.bytes());
    return bytes;
  }

  std::unique_ptr<Device> device_;
};

TEST_P(CudaLayerCompute, agrees_with_the_host_for_1_to_33_rows) {
  const auto& [dtype, layout] = GetParam();
  constexpr std::uint32_t k = 2;
  for (const auto& [hidden, inter] : {std::pair{264U, 520U}, {50U, 83U}, {1024U, 768U}}) {
    const BlobFormat format{hidden,         inter, dtype, layout.transposed, layout.interleaved,
                            layout.has_bias};
    const RandomExpert experts[k] = {RandomExpert{format, 1}, RandomExpert{format, 2}};
    const auto first = place(experts[0].blob(), format.bytes());
    const auto second = place(experts[1].blob(), format.bytes());
    const auto cuda = make_cuda_layer_compute(format, {}, 0);
    const auto host = make_host_layer_compute(format, {}, 1);
    for (const DType x_dtype : dtypes) {
      for (const std::uint32_t tokens : {1U, 2U, 7U, 8U, 9U, 32U, 33U}) {
        std::mt19937 random{tokens};
        std::normal_distribution<float> normal;
        std::vector<float> values(std::size_t{tokens} * hidden);
        std::ranges::generate(values, [&] { return normal(random); });
        std::vector<std::byte> x(values.size() * size_of(x_dtype));
        narrow(values.data(), values.size(), x_dtype, x.data());
        const std::vector<float> weights(std::size_t{tokens} * k, 0.5F);
        std::vector<std::uint32_t> token_rows;
        std::vector<std::uint32_t> out_rows[k];
        for (std::uint32_t t = 0; t < tokens; ++t) {
          token_rows.push_back(t);
          for (std::uint32_t e = 0; e < k; ++e) out_rows[e].push_back(t * k + e);
        }

        LayerArgs args;
        args.tokens = tokens;
        args.k = k;
        args.x_dtype = x_dtype;
        const auto run = [&](LayerCompute& layers, const std::byte* a, const std::byte* b) {
          const ExpertTask tasks[] = {{a, token_rows, out_rows[0]}, {b, token_rows, out_rows[1]}};
          layers.begin(args);
          layers.run(tasks);
          layers.end();
        };
        std::vector<std::byte> wanted(x.size());
        args.x = x.data();
        args.top_k_weights = weights.data();
        args.out = wanted.data();
        run(*host, experts[0].blob(), experts[1].blob());

        const auto device_x = place(x.data(), x.size());
        const auto device_weights = place(weights.data(), weights.size() * sizeof(float));
        const Buffer device_out{*device_, x.size()};
        args.x = device_x->data();
        args.top_k_weights = device_weights->data();
        args.out = device_out.data();
        run(*cuda, first->data(), second->data());
        const std::vector<std::byte> got = read(device_out);

        std::vector<float> ours(values.size());
        std::vector<float> hosts(values.size());
        widen(got.data(), x_dtype, ours.size(), ours.data());
        widen(wanted.data(), x_dtype, hosts.size(), hosts.data());
        const float unit = rounding_of(x_dtype);
        for (std::size_t i = 0; i < ours.size(); ++i) {
          ASSERT_NEAR(ours[i], hosts[i], unit * (1 + std::abs(hosts[i])))
              << "hidden " << hidden << ", " << name_of(x_dtype) << ", " << tokens << " tokens at "
              << i;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(all, CudaLayerCompute,
                         ::testing::Combine(::testing::ValuesIn(dtypes),
                                            ::testing::ValuesIn(layouts)),
                         [](const auto& test) {
                           return std::string{name_of(std::get<0>(test.param))} + "_" +
                                  std::get<1>(test.param).name;
                         });

}  // namespace
}  // namespace spmoe
