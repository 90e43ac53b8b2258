#include "compute/expert_ffn.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "allocation_counter.hpp"
#include "base/error.hpp"
#include "compute/host/host_kernel.hpp"
#include "compute/host/thread_team.hpp"
#include "message_of.hpp"
#include "random_expert.hpp"

namespace spmoe {
namespace {

std::vector<float> random_rows(std::size_t rows, std::size_t hidden, std::uint32_t seed) {
  std::mt19937 random{seed};
  std::normal_distribution<float> normal{0.0F, 2.0F};
  std::vector<float> x(rows * hidden);
  std::ranges::generate(x, [&] { return normal(random); });
  return x;
}

std::vector<std::uint32_t> count_up(std::size_t rows, std::uint32_t from = 0) {
  std::vector<std::uint32_t> indices(rows);
  std::iota(indices.begin(), indices.end(), from);
  return indices;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const HostKernel& kernel : host_kernels()) {
    if (kernel.supported()) names.emplace_back(kernel.name);
  }
  return names;
}

struct Layout {
  const char* name;
  bool transposed, interleaved, has_bias;
};
constexpr Layout layouts[] = {{"plain", false, false, false},
                              {"plain_interleaved_bias", false, true, true},
                              {"transposed", true, false, false},
                              {"gpt_oss", true, true, true}};
constexpr DType dtypes[] = {DType::f32, DType::f16, DType::bf16};

constexpr Activation activations[] = {Activation::silu, Activation::gelu, Activation::gelu_tanh,
                                      Activation::clamped_swiglu};

// The contract of ExpertFfn: every instruction set runs it over every dtype and layout.
class ExpertFfnContract : public ::testing::TestWithParam<std::tuple<std::string, DType, Layout>> {
 protected:
  static BlobFormat format(std::uint32_t hidden, std::uint32_t inter) {
    const auto& [isa, dtype, layout] = GetParam();
    return {hidden, inter, dtype, layout.transposed, layout.interleaved, layout.has_bias};
  }
  static std::unique_ptr<ExpertFfn> make(const BlobFormat& format, unsigned threads,
                                         ActivationParams params = {}) {
    return make_host_expert_ffn(format, params, threads, std::get<0>(GetParam()));
  }
};

TEST_P(ExpertFfnContract, agrees_with_double_precision_for_1_to_33_rows_and_odd_sizes) {
  constexpr std::pair<std::uint32_t, std::uint32_t> sizes[] = {
      {1, 1}, {3, 5}, {16, 24}, {33, 47}, {65, 31}, {96, 131}, {127, 70}, {50, 83}};
  std::uint32_t seed = 1;
  for (std::size_t n = 0; n < std::size(sizes); ++n) {
    const auto [hidden, inter] = sizes[n];
    const ActivationParams params{
        .kind = activations[n % std::size(activations)], .alpha = 1.7F, .limit = 1.5F};
    const RandomExpert expert{format(hidden, inter), ++seed};
    const auto ffn = make(expert.format, 2, params);
    const std::vector<float> x = random_rows(33, hidden, ++seed);
    std::vector<std::vector<double>> expected;
    for (std::size_t r = 0; r < 33; ++r) {
      expected.push_back(reference(expert, params, x.data() + r * hidden));
    }
    const std::vector<std::uint32_t> rows = count_up(33);
    for (std::size_t count = 1; count <= 33; ++count) {
      std::vector<float> out(33 * hidden, 77.0F);
      const std::span<const std::uint32_t> used{rows.data(), count};
      const ExpertTask task{expert.blob(), used, used};
      ffn->run({&task, 1}, x.data(), out.data());
      for (std::size_t i = 0; i < out.size(); ++i) {
        const double wanted = i < count * hidden ? expected[i / hidden][i % hidden] : 77.0;
        ASSERT_NEAR(static_cast<double>(out[i]), wanted, 3e-5 * (1 + std::abs(wanted)))
            << "hidden " << hidden << " inter " << inter << " rows " << count << " at " << i;
      }
    }
  }
}

TEST_P(ExpertFfnContract, a_row_has_the_same_bits_in_any_company) {
  const BlobFormat shape = format(83, 301);
  const std::vector<RandomExpert> experts{RandomExpert{shape, 1}, RandomExpert{shape, 2},
                                          RandomExpert{shape, 3}};
  constexpr std::uint32_t tokens = 40;
  const std::vector<float> x = random_rows(tokens, shape.hidden, 9);

  // Alone: one row a run, one thread. Output row = expert * tokens + token.
  std::vector<float> alone(experts.size() * tokens * shape.hidden);
  const auto single = make(shape, 1);
  for (std::uint32_t e = 0; e < experts.size(); ++e) {
    for (std::uint32_t t = 0; t < tokens; ++t) {
      const std::uint32_t out_row = e * tokens + t;
      const ExpertTask task{experts[e].blob(), {&t, 1}, {&out_row, 1}};
      single->run({&task, 1}, x.data(), alone.data());
    }
  }

  constexpr std::uint32_t seed = 20240607;
  std::mt19937 random{seed};
  for (const unsigned threads : {1U, 2U, 3U, 5U}) {
    const auto ffn = make(shape, threads);
    for (int round = 0; round < 6; ++round) {
      std::vector<std::vector<std::uint32_t>> token_rows(experts.size());
      std::vector<std::vector<std::uint32_t>> out_rows(experts.size());
      std::vector<ExpertTask> tasks;
      for (std::uint32_t e = 0; e < experts.size(); ++e) {
        token_rows[e] = count_up(tokens);
        std::ranges::shuffle(token_rows[e], random);
        token_rows[e].resize(random() % (tokens + 1));
        for (const std::uint32_t t : token_rows[e]) out_rows[e].push_back(e * tokens + t);
        tasks.push_back({experts[e].blob(), token_rows[e], out_rows[e]});
      }
      std::ranges::shuffle(tasks, random);
      std::vector<float> out(alone.size());
      ffn->run(tasks, x.data(), out.data());
      for (const ExpertTask& task : tasks) {
        for (const std::uint32_t row : task.out_rows) {
          const std::size_t at = std::size_t{row} * shape.hidden;
          ASSERT_EQ(std::memcmp(&out[at], &alone[at], shape.hidden * sizeof(float)), 0)
              << "output row " << row << ", " << threads << " threads, round " << round << ", seed "
              << seed;
        }
      }
    }
  }
}

TEST_P(ExpertFfnContract, reads_blobs_at_any_alignment) {
  const BlobFormat shape = format(37, 50);
  const std::vector<float> x = random_rows(5, shape.hidden, 4);
  const std::vector<std::uint32_t> rows = count_up(5);
  const auto ffn = make(shape, 2);
  std::vector<float> first(x.size());
  for (std::size_t misalignment = 0; misalignment < 9; ++misalignment) {
    const RandomExpert expert{shape, 11, misalignment};
    std::vector<float> out(x.size());
    const ExpertTask task{expert.blob(), rows, rows};
    ffn->run({&task, 1}, x.data(), out.data());
    if (misalignment == 0) first = out;
    EXPECT_EQ(out, first) << misalignment << " bytes off";
  }
}

TEST_P(ExpertFfnContract, nan_and_infinity_stay_in_their_row) {
  const BlobFormat shape = format(45, 39);
  const RandomExpert expert{shape, 5};
  std::vector<float> x = random_rows(9, shape.hidden, 6);
  const std::vector<std::uint32_t> rows = count_up(9);
  const ExpertTask task{expert.blob(), rows, rows};
  const auto ffn = make(shape, 2);
  std::vector<float> clean(x.size());
  ffn->run({&task, 1}, x.data(), clean.data());

  x[2 * shape.hidden + 44] = std::numeric_limits<float>::quiet_NaN();
  x[7 * shape.hidden] = std::numeric_limits<float>::infinity();
  std::vector<float> out(x.size());
  ffn->run({&task, 1}, x.data(), out.data());
  for (std::size_t r = 0; r < 9; ++r) {
    const std::size_t at = r * shape.hidden;
    if (r == 2) {
      EXPECT_TRUE(std::isnan(out[at]));
    } else if (r != 7) {
      EXPECT_EQ(std::memcmp(&out[at], &clean[at], shape.hidden * sizeof(float)), 0) << "row " << r;
    }
  }
}

TEST_P(ExpertFfnContract, a_steady_state_allocates_nothing) {
  const BlobFormat shape = format(40, 72);
  const RandomExpert a{shape, 7};
  const RandomExpert b{shape, 8};
  const std::vector<float> x = random_rows(40, shape.hidden, 10);
  std::vector<float> out(x.size() * 2);
  const std::vector<std::uint32_t> rows = count_up(40);
  const std::vector<std::uint32_t> more_rows = count_up(40, 40);
  const auto ffn = make(shape, 2);
  const auto run = [&](std::size_t count) {
    const ExpertTask tasks[] = {{a.blob(), {rows.data(), count}, {rows.data(), count}},
                                {b.blob(), {rows.data(), count}, {more_rows.data(), count}}};
    ffn->run(tasks, x.data(), out.data());
  };
  run(40);
  const std::size_t before = allocation_count();
  for (const std::size_t count :
       {std::size_t{1}, std::size_t{40}, std::size_t{0}, std::size_t{7}}) {
    run(count);
  }
  EXPECT_EQ(allocation_count() - before, 0u);
}

TEST_P(ExpertFfnContract, no_tasks_and_no_rows_write_nothing) {
  const BlobFormat shape = format(8, 8);
  const RandomExpert expert{shape, 12};
  const auto ffn = make(shape, 2);
  const std::vector<float> x(8, 1.0F);
  std::vector<float> out(8, 5.0F);
  ffn->run({}, x.data(), out.data());
  const ExpertTask task{expert.blob(), {}, {}};
  ffn->run({&task, 1}, x.data(), out.data());
  EXPECT_EQ(out, std::vector<float>(8, 5.0F));
}

INSTANTIATE_TEST_SUITE_P(host, ExpertFfnContract,
                         ::testing::Combine(::testing::ValuesIn(supported_isas()),
                                            ::testing::ValuesIn(dtypes),
                                            ::testing::ValuesIn(layouts)),
                         [](const auto& test) {
                           return std::get<0>(test.param) + "_" +
                                  std::string{name_of(std::get<1>(test.param))} + "_" +
                                  std::get<2>(test.param).name;
                         });

constexpr BlobFormat small{.hidden = 8, .inter = 8};

TEST(MakeHostExpertFfn, names_the_choices_when_the_instruction_set_is_unknown) {
  std::string choices = "auto";
  for (const std::string& isa : supported_isas()) choices += ", " + isa;
  EXPECT_EQ(
      message_of<InvalidArgument>(
          [] { static_cast<void>(make_host_expert_ffn(small, {}, 1, "mmx")); }),
      "instruction set 'mmx' asked, but this build has none of that name; use one of: " + choices);
}

TEST(MakeHostExpertFfn, picks_the_first_kernel_that_this_processor_runs) {
  EXPECT_EQ(make_host_expert_ffn(small, {}, 1)->name(), supported_isas().front());
}

TEST(MakeHostExpertFfn, takes_one_thread_a_core_when_none_are_named) {
  EXPECT_NE(make_host_expert_ffn(small, {}, 0), nullptr);
}

TEST(MakeHostExpertFfn, refuses_an_expert_without_weights) {
  EXPECT_EQ(message_of<InvalidArgument>(
                [] { static_cast<void>(make_host_expert_ffn({.hidden = 8}, {}, 1)); }),
            "an expert of hidden 8 and inter 0 has no weights; both must be above 0");
}

TEST(HostExpertFfn, refuses_a_task_whose_row_lists_differ) {
  const auto ffn = make_host_expert_ffn(small, {}, 1);
  const RandomExpert expert{small, 1};
  const std::vector<std::uint32_t> rows = count_up(3);
  const std::vector<float> x(24, 1.0F);
  std::vector<float> out(24, 5.0F);
  const ExpertTask task{expert.blob(), rows, {rows.data(), 2}};
  EXPECT_EQ(message_of<InvalidArgument>([&] { ffn->run({&task, 1}, x.data(), out.data()); }),
            "task 0 reads 3 rows but writes 2; give one output row per token row");
  EXPECT_EQ(out, std::vector<float>(24, 5.0F));
}

TEST(HostKernels, end_with_one_that_runs_everywhere) {
  std::set<std::string_view> names;
  for (const HostKernel& kernel : host_kernels()) names.insert(kernel.name);
  EXPECT_EQ(names.size(), host_kernels().size());
  EXPECT_EQ(host_kernels().back().name, "baseline");
  EXPECT_TRUE(host_kernels().back().supported());
}

TEST(ThreadTeam, runs_every_item_once_in_every_phase) {
  for (const unsigned threads : {1U, 2U, 4U}) {
    ThreadTeam team{threads};
    EXPECT_EQ(team.size(), threads);
    std::vector<std::uint32_t> calls(64);
    std::uint32_t expected = 0;
    for (std::uint32_t phase = 0; phase < 2000; ++phase) {
      const std::uint32_t count = phase % 65;
      team.run(count, [&](std::uint32_t item, unsigned thread) noexcept {
        if (thread < threads) ++calls[item];
      });
      expected += count;
      ASSERT_EQ(std::accumulate(calls.begin(), calls.end(), 0U), expected) << "phase " << phase;
    }
    for (std::uint32_t item = 0; item < 64; ++item) {
      std::uint32_t wanted = 0;
      for (std::uint32_t phase = 0; phase < 2000; ++phase) wanted += item < phase % 65 ? 1U : 0U;
      EXPECT_EQ(calls[item], wanted) << "item " << item;
    }
  }
}

TEST(ThreadTeam, joins_threads_that_never_worked) {
  for (int round = 0; round < 50; ++round) ThreadTeam{4};
}

}  // namespace
}  // namespace spmoe
