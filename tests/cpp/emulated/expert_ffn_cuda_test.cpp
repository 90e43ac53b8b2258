// The CUDA kernels over the emulated processor, against the host's and double precision.
#include "compute/cuda/expert_ffn_cuda.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "base/error.hpp"
#include "expert_layouts.hpp"
#include "message_of.hpp"
#include "random_expert.hpp"

namespace spmoe {
namespace {

constexpr Activation activations[] = {Activation::silu, Activation::gelu, Activation::gelu_tanh,
                                      Activation::clamped_swiglu};

/// Memory as a device gives it: aligned, and not a byte more than asked.
template <class T>
class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t count)
      : data_{static_cast<T*>(::operator new(count * sizeof(T), alignment))}, count_{count} {
    std::memset(data_, 0, count * sizeof(T));
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory() { ::operator delete(data_, alignment); }

  [[nodiscard]] T* data() const { return data_; }
  [[nodiscard]] std::size_t size() const { return count_; }

 private:
  static constexpr std::align_val_t alignment{256};
  T* data_;
  std::size_t count_;
};

/// Rows of any type, kept both as the kernels read them and widened.
struct Rows {
  Rows(std::size_t count, std::size_t width, DType dtype, std::uint32_t seed)
      : type{dtype}, values(count * width), bytes{values.size() * size_of(dtype)} {
    std::mt19937 random{seed};
    std::normal_distribution<float> normal{0.0F, 2.0F};
    std::ranges::generate(values, [&] { return normal(random); });
    settle();
  }
  void settle() {
    narrow(values.data(), values.size(), type, bytes.data());
    widen(bytes.data(), type, values.size(), values.data());
  }

  DType type;
  std::vector<float> values;
  DeviceMemory<std::byte> bytes;
};

/// An expert's blob where the device would hold it.
struct PlacedExpert {
  PlacedExpert(const BlobFormat& format, std::uint32_t seed, std::size_t misalignment = 0)
      : expert{format, seed}, memory{misalignment + format.bytes()}, offset{misalignment} {
    std::memcpy(memory.data() + offset, expert.blob(), format.bytes());
  }
  [[nodiscard]] const std::byte* blob() const { return memory.data() + offset; }

  RandomExpert expert;
  DeviceMemory<std::byte> memory;
  std::size_t offset;
};

/// The most by which results differ whose sums have another order, last rounding included.
float rounding_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return 1e-5F;
    case DType::f16: return 1e-3F;
    case DType::bf16: return 8e-3F;
  }
  return 0;
}

/// Output rows by expert; those not named stay 77.
using Routing = std::vector<std::vector<std::uint32_t>>;

class Kernels {
 public:
  Kernels(const BlobFormat& format, ActivationParams params, std::uint32_t wanted_blocks = 1024)
      : hidden_{format.hidden},
        ffn_{format, params, wanted_blocks},
        scratch_{ffn_.scratch_bytes()} {}

  std::vector<float> run(const std::vector<const std::byte*>& blobs, const Routing& routing,
                         const Rows& x, std::uint32_t k) {
    const auto tokens = static_cast<std::uint32_t>(x.values.size() / hidden_);
    LayerArgs args;
    args.tokens = tokens;
    args.k = k;
    args.x = x.bytes.data();
    args.x_dtype = x.type;
    Routing token_rows = routing;
    std::vector<ExpertTask> tasks;
    for (std::size_t e = 0; e < blobs.size(); ++e) {
      for (std::uint32_t& row : token_rows[e]) row /= k;
      tasks.push_back({blobs[e], token_rows[e], routing[e]});
    }
    const DeviceMemory<float> out{std::size_t{tokens} * k * hidden_};
    std::fill_n(out.data(), out.size(), 77.0F);
    ffn_.run(tasks, args, out.data(), scratch_.data());
    return {out.data(), out.data() + out.size()};
  }

 private:
  std::size_t hidden_;
  cuda::ExpertFfn ffn_;
  DeviceMemory<std::byte> scratch_;
};

std::vector<std::uint32_t> count_up(std::size_t rows) {
  std::vector<std::uint32_t> indices(rows);
  std::iota(indices.begin(), indices.end(), 0U);
  return indices;
}

// Every dtype of weights and layout, with rows of every dtype.
class CudaKernels : public ::testing::TestWithParam<std::tuple<DType, Layout>> {
 protected:
  static BlobFormat format(std::uint32_t hidden, std::uint32_t inter) {
    const auto& [dtype, layout] = GetParam();
    return {hidden, inter, dtype, layout.transposed, layout.interleaved, layout.has_bias};
  }
};

TEST_P(CudaKernels, agree_with_double_precision_for_any_rows_and_sizes) {
  // Of one chunk of inputs and of several, of one tile of outputs and of several, whole and not.
  constexpr std::pair<std::uint32_t, std::uint32_t> sizes[] = {
      {1, 1}, {3, 5}, {16, 24}, {72, 40}, {264, 48}, {50, 83}, {40, 520}, {600, 280}};
  constexpr std::size_t counts[] = {1, 9, 2, 33, 7, 32, 8};
  std::uint32_t seed = 1;
  for (std::size_t n = 0; n < std::size(sizes); ++n) {
    const auto [hidden, inter] = sizes[n];
    const ActivationParams params{
        .kind = activations[n % std::size(activations)], .alpha = 1.7F, .limit = 1.5F};
    const PlacedExpert expert{format(hidden, inter), ++seed};
    const Rows x{33, hidden, dtypes[n % std::size(dtypes)], ++seed};
    std::vector<std::vector<double>> expected;
    expected.reserve(33);
    for (std::size_t r = 0; r < 33; ++r) {
      expected.push_back(reference(expert.expert, params, x.values.data() + r * hidden));
    }
    // Of two chunks, a block takes one; or both, one after the other.
    Kernels kernels{expert.expert.format, params, n % 2 == 0 ? 1024U : 1U};
    for (std::size_t c = 0; c < 2; ++c) {
      const std::size_t count = counts[(2 * n + c) % std::size(counts)];
      const std::vector<float> out = kernels.run({expert.blob()}, {count_up(count)}, x, 1);
      for (std::size_t i = 0; i < out.size(); ++i) {
        const double wanted = i < count * hidden ? expected[i / hidden][i % hidden] : 77.0;
        ASSERT_NEAR(static_cast<double>(out[i]), wanted, 1e-5 * (1 + std::abs(wanted)))
            << "hidden " << hidden << " inter " << inter << " rows " << count << " at " << i;
      }
    }
  }
}

TEST_P(CudaKernels, err_no_more_than_the_hosts_on_long_sums) {
  const BlobFormat shape = format(1536, 32);
  const PlacedExpert expert{shape, 3};
  const std::vector<std::uint32_t> rows = count_up(4);
  for (const DType dtype : dtypes) {
    const Rows x{4, shape.hidden, dtype, 4};
    const std::vector<float> ours = Kernels{shape, {}}.run({expert.blob()}, {rows}, x, 1);
    std::vector<float> hosts(ours.size());
    const ExpertTask task{expert.blob(), rows, rows};
    make_host_expert_ffn(shape, {}, 1, "baseline")->run({&task, 1}, x.values.data(), hosts.data());
    double our_error = 0;
    double host_error = 0;
    for (std::size_t r = 0; r < 4; ++r) {
      const std::vector<double> wanted =
          reference(expert.expert, {}, x.values.data() + r * shape.hidden);
      for (std::size_t h = 0; h < shape.hidden; ++h) {
        our_error += std::pow(static_cast<double>(ours[r * shape.hidden + h]) - wanted[h], 2);
        host_error += std::pow(static_cast<double>(hosts[r * shape.hidden + h]) - wanted[h], 2);
      }
    }
    EXPECT_LE(std::sqrt(our_error), 1.5 * std::sqrt(host_error)) << name_of(dtype) << " rows";
  }
}

TEST_P(CudaKernels, give_a_row_the_same_bits_in_any_company) {
  const BlobFormat shape = format(40, 264);
  const PlacedExpert experts[] = {{shape, 1}, {shape, 2}, {shape, 3}};
  const std::vector<const std::byte*> blobs{experts[0].blob(), experts[1].blob(),
                                            experts[2].blob()};
  constexpr std::uint32_t tokens = 20;
  constexpr std::uint32_t k = 2;
  const Rows x{tokens, shape.hidden, DType::f32, 9};
  Kernels kernels{shape, {}};

  constexpr std::uint32_t seed = 20240607;
  std::mt19937 random{seed};
  std::vector<std::uint32_t> all = count_up(tokens * k);
  std::ranges::shuffle(all, random);
  // One expert takes 25 of the rows, the second 8, the last 7; then some of them come alone.
  const Routing routing{{all.begin(), all.begin() + 25},
                        {all.begin() + 25, all.begin() + 33},
                        {all.begin() + 33, all.end()}};
  const std::vector<float> together = kernels.run(blobs, routing, x, k);
  for (std::size_t e = 0; e < blobs.size(); ++e) {
    for (std::size_t i = e; i < routing[e].size(); i += 4) {
      const std::uint32_t row = routing[e][i];
      const std::vector<float> alone = kernels.run({blobs[e]}, {{row}}, x, k);
      const std::size_t at = std::size_t{row} * shape.hidden;
      ASSERT_EQ(std::memcmp(&alone[at], &together[at], shape.hidden * sizeof(float)), 0)
          << "expert " << e << ", output row " << row << ", seed " << seed;
    }
  }
}

TEST_P(CudaKernels, read_blobs_and_rows_at_any_alignment) {
  const BlobFormat shape = format(40, 56);
  const Rows x{5, shape.hidden, DType::f32, 4};
  Kernels kernels{shape, {}};
  const PlacedExpert aligned{shape, 11};
  const std::vector<float> first = kernels.run({aligned.blob()}, {count_up(5)}, x, 1);
  for (const std::size_t misalignment : {1U, 2U, 4U, 8U}) {
    const PlacedExpert expert{shape, 11, misalignment};
    EXPECT_EQ(kernels.run({expert.blob()}, {count_up(5)}, x, 1), first) << misalignment;
  }
}

TEST_P(CudaKernels, keep_nan_and_infinity_in_their_row) {
  const BlobFormat shape = format(45, 39);
  const PlacedExpert expert{shape, 5};
  for (const DType dtype : dtypes) {
    Rows x{9, shape.hidden, dtype, 6};
    Kernels kernels{shape, {}};
    const std::vector<float> clean = kernels.run({expert.blob()}, {count_up(9)}, x, 1);
    x.values[2 * shape.hidden + 44] = std::numeric_limits<float>::quiet_NaN();
    x.values[7 * shape.hidden] = std::numeric_limits<float>::infinity();
    x.settle();
    const std::vector<float> out = kernels.run({expert.blob()}, {count_up(9)}, x, 1);
    for (std::size_t r = 0; r < 9; ++r) {
      const std::size_t at = r * shape.hidden;
      if (r == 2) {
        EXPECT_TRUE(std::isnan(out[at]));
      } else if (r == 7) {
        EXPECT_FALSE(std::isfinite(out[at]));
      } else {
        EXPECT_EQ(std::memcmp(&out[at], &clean[at], shape.hidden * sizeof(float)), 0) << r;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(emulated, CudaKernels,
                         ::testing::Combine(::testing::ValuesIn(dtypes),
                                            ::testing::ValuesIn(layouts)),
                         [](const auto& test) {
                           return std::string{name_of(std::get<0>(test.param))} + "_" +
                                  std::get<1>(test.param).name;
                         });

constexpr BlobFormat small{.hidden = 24, .inter = 16};

TEST(CudaExpertFfn, runs_more_experts_and_rows_than_one_launch_takes) {
  constexpr std::size_t expert_count = cuda::max_groups + 3;
  constexpr std::uint32_t tokens = 2 * cuda::max_launch_rows;
  std::vector<std::unique_ptr<PlacedExpert>> experts;
  std::vector<const std::byte*> blobs;
  Routing routing(expert_count);
  for (std::uint32_t e = 0; e < expert_count; ++e) {
    experts.push_back(std::make_unique<PlacedExpert>(small, e));
    blobs.push_back(experts.back()->blob());
  }
  // Half of the rows go to one expert, one expert gets none, and the others share the rest.
  for (std::uint32_t row = 0; row < tokens; ++row) {
    routing[row % 2 == 0 ? 5 : 6 + row % (expert_count - 6)].push_back(row);
  }
  ASSERT_TRUE(routing[0].empty());
  const Rows x{tokens, small.hidden, DType::bf16, 8};
  const std::vector<float> out = Kernels{small, {}}.run(blobs, routing, x, 1);
  for (std::size_t e = 0; e < expert_count; ++e) {
    for (const std::uint32_t row : routing[e]) {
      const std::size_t at = std::size_t{row} * small.hidden;
      const auto wanted = reference(experts[e]->expert, {}, x.values.data() + at);
      for (std::size_t h = 0; h < small.hidden; ++h) {
        ASSERT_NEAR(static_cast<double>(out[at + h]), wanted[h], 1e-5 * (1 + std::abs(wanted[h])))
            << "expert " << e << " row " << row;
      }
    }
  }
}

TEST(CudaExpertFfn, sums_a_layer_as_the_host_does) {
  constexpr std::uint32_t tokens = 3;
  constexpr std::uint32_t k = 4;
  const BlobFormat shape{.hidden = 300, .inter = 8};
  const PlacedExpert expert{shape, 2};
  const std::vector<std::uint32_t> out_rows = count_up(tokens * k);
  std::vector<std::uint32_t> token_rows = out_rows;
  for (std::uint32_t& row : token_rows) row /= k;
  const ExpertTask task{expert.blob(), token_rows, out_rows};
  for (const DType x_dtype : dtypes) {
    for (const DType weights_dtype : dtypes) {
      const Rows x{tokens, shape.hidden, x_dtype, 3};
      const Rows weights{tokens, k, weights_dtype, 5};
      LayerArgs args;
      args.tokens = tokens;
      args.k = k;
      args.x = x.bytes.data();
      args.x_dtype = x_dtype;
      args.top_k_weights = weights.bytes.data();
      args.weights_dtype = weights_dtype;
      const Rows ours{tokens, shape.hidden, x_dtype, 0};
      Rows hosts{tokens, shape.hidden, x_dtype, 0};

      cuda::ExpertFfn ffn{shape, {}};
      const DeviceMemory<std::byte> scratch{ffn.scratch_bytes()};
      const DeviceMemory<float> expert_out{std::size_t{tokens} * k * shape.hidden};
      args.out = ours.bytes.data();
      ffn.run({&task, 1}, args, expert_out.data(), scratch.data());
      ffn.combine(args, expert_out.data());

      const auto host = make_host_layer_compute(shape, {}, 1, "baseline");
      args.out = hosts.bytes.data();
      host->begin(args);
      host->run({&task, 1});
      host->end();

      std::vector<float> values(ours.values.size());
      widen(ours.bytes.data(), x_dtype, values.size(), values.data());
      widen(hosts.bytes.data(), x_dtype, values.size(), hosts.values.data());
      const float unit = rounding_of(x_dtype);
      for (std::size_t i = 0; i < values.size(); ++i) {
        ASSERT_NEAR(values[i], hosts.values[i], unit * (1 + std::abs(hosts.values[i])))
            << name_of(x_dtype) << " " << name_of(weights_dtype) << " at " << i;
      }
    }
  }
}

TEST(CudaExpertFfn, leaves_all_alone_when_there_is_nothing_to_do) {
  const PlacedExpert expert{small, 12};
  const Rows x{1, small.hidden, DType::f32, 1};
  const std::vector<float> untouched(small.hidden, 77.0F);
  EXPECT_EQ((Kernels{small, {}}.run({}, {}, x, 1)), untouched);
  EXPECT_EQ((Kernels{small, {}}.run({expert.blob()}, {{}}, x, 1)), untouched);
}

TEST(CudaExpertFfn, refuses_what_the_host_refuses) {
  EXPECT_EQ(message_of<InvalidArgument>([] { cuda::ExpertFfn({.hidden = 8}, {}); }),
            "an expert of hidden 8 and inter 0 has no weights; both must be above 0");
  cuda::ExpertFfn ffn{small, {}};
  const std::vector<std::uint32_t> rows = count_up(3);
  const ExpertTask task{nullptr, rows, {rows.data(), 2}};
  EXPECT_EQ(message_of<InvalidArgument>([&] { ffn.run({&task, 1}, {}, nullptr, nullptr); }),
            "task 0 reads 3 rows but writes 2; give one output row per token row");
}

}  // namespace
}  // namespace spmoe
