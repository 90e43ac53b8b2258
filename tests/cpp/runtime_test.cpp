#include "runtime/runtime.hpp"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "allocation_counter.hpp"
#include "base/convert.hpp"
#include "base/error.hpp"
#include "fake_store.hpp"
#include "layer_calls.hpp"
#include "message_of.hpp"
#include "policy_names.hpp"

namespace spmoe {
namespace {

/// The definition, in double precision.
std::vector<double> reference(const FakeStore& of, const LayerCall& call) {
  const std::size_t hidden = of.format().hidden;
  std::vector<double> out(call.x.size());
  for (std::size_t i = 0; i < call.index.size(); ++i) {
    const std::size_t token = i / call.k;
    const ExpertId id{call.layer, static_cast<std::uint16_t>(call.index[i])};
    const auto row = reference(of.expert(id), {}, call.x.data() + token * hidden);
    for (std::size_t h = 0; h < hidden; ++h) {
      out[token * hidden + h] += static_cast<double>(call.weights[i]) * row[h];
    }
  }
  return out;
}

TEST(Runtime, forward_is_the_weighted_sum_of_the_experts) {
  std::mt19937 random{1};
  Runtime runtime{store(), options(all_slots)};
  for (const std::uint32_t tokens : {1U, 2U, 5U, 40U}) {
    for (const std::uint32_t k : {1U, 2U, 5U, 8U}) {
      const LayerCall call = random_call(random, 1, tokens, k);
      const auto out = forward(runtime, call);
      const auto wanted = reference(*store(), call);
      for (std::size_t i = 0; i < out.size(); ++i) {
        ASSERT_NEAR(static_cast<double>(out[i]), wanted[i], 1e-4 * (1 + std::abs(wanted[i])))
            << tokens << " tokens, k " << k << ", at " << i;
      }
    }
  }
}

TEST(Runtime, a_request_over_files_that_were_written_to_is_refused) {
  const auto files = std::make_shared<FakeStore>(format, 2, 8);
  Runtime runtime{files, options(4)};
  runtime.begin_request();
  files->changed = true;
  EXPECT_THROW(runtime.begin_request(), CheckpointChanged);
  files->changed = false;
  runtime.begin_request();
}

TEST(Runtime, sums_in_the_order_of_the_router_s_choices) {
  std::mt19937 random{30};
  Runtime runtime{store(), options(4)};
  LayerCall call = random_call(random, 1, 1, 5);
  call.weights = {1.0F, 0.5F, 2.0F, 0.25F, 1.0F};  // exact, so that only the sum rounds
  std::vector<float> sum(format.hidden, 0.0F);
  for (std::size_t i = 0; i < call.k; ++i) {
    const auto row = forward(runtime, {1, 1, 1, call.x, {call.index[i]}, {1.0F}});
    for (std::size_t h = 0; h < sum.size(); ++h) sum[h] += call.weights[i] * row[h];
  }
  EXPECT_TRUE(same_bits(forward(runtime, call), sum));
}

TEST(Runtime, every_dtype_of_blobs_and_tensors_computes_the_same_sum) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    SCOPED_TRACE(name_of(dtype));
    const BlobFormat with_bias{.hidden = 24, .inter = 16, .dtype = dtype, .has_bias = true};
    const auto biased = std::make_shared<const FakeStore>(with_bias, 1, 4);
    RuntimeOptions whole = options(0);
    whole.expert_memory_bytes = 1 << 20;
    Runtime runtime{biased, whole};
    std::mt19937 random{2};
    LayerCall call = random_call(random, 0, 3);
    for (std::int64_t& expert : call.index) expert %= 4;
    // Round x and the weights to `dtype`, so that both sides see the same values.
    std::vector<std::uint32_t> x(call.x.size());
    std::vector<std::uint32_t> weights(call.weights.size());
    narrow(call.x.data(), call.x.size(), dtype, x.data());
    widen(x.data(), dtype, call.x.size(), call.x.data());
    narrow(call.weights.data(), call.weights.size(), dtype, weights.data());
    widen(weights.data(), dtype, call.weights.size(), call.weights.data());
    std::vector<std::uint32_t> narrow_out(x.size());
    runtime.forward(0, {.tokens = 3,
                        .k = top_k,
                        .x = x.data(),
                        .x_dtype = dtype,
                        .top_k_index = call.index.data(),
                        .top_k_weights = weights.data(),
                        .weights_dtype = dtype,
                        .out = narrow_out.data()});
    std::vector<float> out(x.size());
    widen(narrow_out.data(), dtype, out.size(), out.data());
    const auto wanted = reference(*biased, call);
    const double step = dtype == DType::bf16 ? 1e-2 : 2e-3;
    for (std::size_t i = 0; i < out.size(); ++i) {
      ASSERT_NEAR(static_cast<double>(out[i]), wanted[i], step * (1 + std::abs(wanted[i])));
    }
  }
}

TEST(Runtime, no_tokens_and_no_choices_are_calls_like_any_other) {
  Runtime runtime{store(), options(2)};
  const LayerCall none{0, 0, top_k, {}, {}, {}};
  EXPECT_TRUE(forward(runtime, none).empty());
  const LayerCall unrouted{0, 1, 0, std::vector<float>(format.hidden, 1.0F), {}, {}};
  EXPECT_EQ(forward(runtime, unrouted), std::vector<float>(format.hidden, 0.0F));
  EXPECT_EQ(runtime.stats().link.bytes, 0u);
}

TEST(Runtime, gives_the_same_bits_at_every_budget_and_thread_count) {
  const auto calls = conversation(3);
  for (const SlotIndex slot_count : {2U, 3U, 5U, 8U, 13U, 23U, 24U}) {
    for (const unsigned threads : {1U, 3U}) {
      SCOPED_TRACE(::testing::Message() << slot_count << " slots, " << threads << " threads");
      RuntimeOptions some = options(slot_count);
      some.compute_threads = threads;
      some.link.copy_threads = 4 - threads;
      Runtime runtime{store(), some};
      EXPECT_EQ(runtime.stats().slot_count, slot_count);
      expect_same_bits(run(runtime, calls), 3);
    }
  }
}

TEST(Runtime, gives_the_same_bits_when_the_link_is_slowed_at_random) {
  for (std::uint32_t seed = 4; seed < 10; ++seed) {
    for (const SlotIndex slot_count : {3U, 11U}) {
      RuntimeOptions slow = options(slot_count);
      slow.compute_threads = 2;
      slow.link.copy_threads = 3;
      slow.link.faults = planted({.delay_seed = seed, .max_delay_us = 60});
      Runtime runtime{store(), slow};
      SCOPED_TRACE(::testing::Message() << slot_count << " slots");
      expect_same_bits(run(runtime, conversation(seed)), seed);
    }
  }
}

TEST(Runtime, gives_the_same_bits_with_predictions) {
  const auto calls = conversation(11);
  Runtime runtime{store(), options(6)};
  std::mt19937 random{12};
  std::vector<float> scores(expert_count);
  std::vector<std::vector<float>> outs;
  for (const LayerCall& call : calls) {
    for (std::uint16_t layer = 0; layer < layer_count; ++layer) {
      std::ranges::generate(scores, [&] { return static_cast<float>(random() % 100); });
      runtime.predict(layer, scores);
    }
    outs.push_back(forward(runtime, call));
    if (call.layer + 1 == layer_count) runtime.end_iteration(2);
  }
  expect_same_bits(outs, 11);
  const RuntimeStats stats = runtime.stats();
  for (const LayerStats& layer : stats.layers) EXPECT_EQ(layer.predictions, calls.size());
  EXPECT_EQ(stats.iterations, 9u);
  EXPECT_EQ(stats.accepted, 18u);
}

TEST(Runtime, gives_the_same_bits_under_every_policy_whatever_another_thread_predicts) {
  const auto calls = conversation(31);
  for (const std::string& prefetch : prefetch_policy_names()) {
    for (const std::string& eviction : eviction_policy_names()) {
      SCOPED_TRACE(prefetch + " with " + eviction);
      RuntimeOptions some = options(7);
      some.policies = {prefetch, eviction};
      Runtime runtime{store(), some};
      runtime.set_limits({.cutoff_layer = 2,
                          .budget_bytes = std::vector<std::uint64_t>(layer_count, 4 * slot_bytes),
                          .break_even = 0.3F});
      RoutingTrace trace{layer_count, expert_count};
      trace.append(0, std::vector<std::uint16_t>{0, 1, 2, 3, 4, 5, 6, 7});
      trace.append(1, std::vector<std::uint16_t>{0, 1, 2, 3, 4, 5, 6, 7});
      trace.append(2, std::vector<std::uint16_t>{5});  // which the run leaves
      runtime.replay_routing(std::move(trace));
      std::atomic<bool> stop{false};
      std::thread predictor{[&] {
        std::mt19937 random{32};
        std::vector<float> scores(expert_count);
        while (!stop) {
          for (std::uint16_t layer = 0; layer < layer_count; ++layer) {
            std::ranges::generate(scores, [&] {
              return random() % 9 == 0 ? std::nanf("") : static_cast<float>(random() % 100) / 50;
            });
            runtime.predict(layer, scores,
                            random() % 2 == 0 ? PredictionSource::draft : PredictionSource::target);
          }
          if (random() % 8 == 0) runtime.begin_request();
        }
      }};
      const auto outs = run(runtime, calls);
      stop = true;
      predictor.join();
      expect_same_bits(outs, 31);
      EXPECT_EQ(runtime.stats().policy, prefetch);
      EXPECT_EQ(runtime.stats().eviction, eviction);
      runtime.close();
      EXPECT_EQ(moved(total(runtime)), runtime.stats().link.bytes);
    }
  }
}

TEST(Runtime, accounts_for_every_byte_when_wrong_prefetches_are_cancelled_late_and_fail) {
  const auto calls = conversation(34);
  std::uint64_t cancelled_bytes = 0;
  for (const std::string& prefetch : prefetch_policy_names()) {
    for (const SlotIndex slot_count : {3U, 9U, all_slots}) {
      SCOPED_TRACE(prefetch + " with " + std::to_string(slot_count) + " slots");
      RuntimeOptions some = options(slot_count);
      some.policies.prefetch = prefetch;
      some.link.faults = planted();
      Runtime runtime{store(), some};
      std::mt19937 random{slot_count};
      std::vector<float> scores(expert_count);
      std::vector<std::vector<float>> outs;
      for (const LayerCall& call : calls) {
        const auto fault = static_cast<std::uint64_t>(random() % 60);
        some.link.faults->plant(
            {.fail_at_chunk = fault, .delay_seed = slot_count, .max_delay_us = 40});
        for (std::uint16_t layer = 0; layer < layer_count; ++layer) {
          std::ranges::generate(scores, [&] { return static_cast<float>(random() % 2) * 1.5F; });
          runtime.predict(layer, scores, PredictionSource::draft);
          runtime.predict(layer, scores, PredictionSource::target);
        }
        for (const std::size_t done = outs.size(); outs.size() == done;) {
          try {
            outs.push_back(forward(runtime, call));
          } catch (const DeviceError&) {
            runtime.begin_request();
          }
        }
        if (random() % 4 == 0) runtime.end_iteration(0);
        if (random() % 8 == 0) runtime.begin_request();
      }
      expect_same_bits(outs, 34);
      runtime.close();
      const LayerStats sum = total(runtime);
      EXPECT_EQ(moved(sum), runtime.stats().link.bytes);
      EXPECT_LE(sum.prefetch_used_bytes, sum.prefetch_bytes);
      cancelled_bytes += sum.cancelled_bytes;
    }
  }
  EXPECT_GT(cancelled_bytes, 0u);
}

TEST(Runtime, a_prefetch_that_the_router_did_not_choose_gives_the_link_to_the_demand) {
  RuntimeOptions slow = options(3);
  slow.policies.prefetch = "sp-moe";
  slow.link.link_gbps = 1e-3;
  Runtime runtime{store(), slow};
  std::mt19937 random{35};
  LayerCall call = random_call(random, 1, 1);
  // Until the router is faster than the link, as it nearly always is. No expert stays for its turn.
  std::int64_t expert = 0;
  for (int round = 0; round < 100 && total(runtime).cancelled_bytes == 0; ++round) {
    expert = 4 - expert;
    std::vector<float> scores(expert_count, 0.0F);
    scores[static_cast<std::size_t>(expert)] = 1.5F;
    call.index = {expert + 1, expert + 2};
    runtime.predict(1, scores);
    forward(runtime, call);
    runtime.end_iteration(0);
  }
  EXPECT_GT(total(runtime).cancelled_bytes, 0u);
  runtime.close();
  EXPECT_EQ(moved(total(runtime)), runtime.stats().link.bytes);
}

TEST(Runtime, several_prefetches_of_small_experts_are_on_the_link_at_a_time) {
  RuntimeOptions slow = options(all_slots);
  slow.experts_per_token = expert_count;
  slow.policies.prefetch = "sp-moe";
  slow.link.link_gbps = 1e-6;  // none arrives meanwhile
  Runtime runtime{store(), slow};
  const std::vector<float> chosen(expert_count, 1.5F);
  for (std::uint16_t layer = 0; layer < layer_count; ++layer) runtime.predict(layer, chosen);
  EXPECT_EQ(runtime.stats().queue_depth, layer_count * expert_count - all_slots / 4u);
  runtime.end_iteration(0);  // or closing would wait for all
}

TEST(Runtime, gives_the_same_bits_from_a_file) {
  const auto in_file = std::make_shared<FakeStore>(format, layer_count, expert_count);
  in_file->move_to_file();
  Runtime runtime{in_file, options(5)};
  expect_same_bits(run(runtime, conversation(13)), 13);
}

TEST(Runtime, gives_the_same_bits_after_failures) {
  const auto calls = conversation(14);
  for (const SlotIndex slot_count : {2U, 5U, 24U}) {
    SCOPED_TRACE(::testing::Message() << slot_count << " slots");
    RuntimeOptions some = options(slot_count);
    some.link.faults = planted();
    Runtime runtime{store(), some};
    std::mt19937 random{15};
    std::vector<std::vector<float>> outs;
    int failures = 0;
    for (const LayerCall& call : calls) {
      some.link.faults->plant({.fail_at_chunk = 1 + random() % 30});
      for (const std::size_t done = outs.size(); outs.size() == done;) {
        try {
          outs.push_back(forward(runtime, call));
        } catch (const DeviceError&) {
          ++failures;
          some.link.faults->plant({});
        }
      }
    }
    EXPECT_GT(failures, 0);
    expect_same_bits(outs, 14);
    runtime.close();
    EXPECT_EQ(moved(total(runtime)), runtime.stats().link.bytes);
  }
}

TEST(Runtime, a_layer_that_wants_more_experts_than_slots_runs_in_waves) {
  std::mt19937 random{16};
  Runtime runtime{store(), options(2)};
  const LayerCall call = random_call(random, 1, 6, expert_count);
  const auto out = forward(runtime, call);
  const auto wanted = reference(*store(), call);
  for (std::size_t i = 0; i < out.size(); ++i) {
    ASSERT_NEAR(static_cast<double>(out[i]), wanted[i], 1e-4 * (1 + std::abs(wanted[i])));
  }
  const RuntimeStats stats = runtime.stats();
  EXPECT_EQ(stats.slot_count, 2u);
  EXPECT_LE(stats.resident_count, 2u);
  EXPECT_EQ(stats.layers[1].misses, expert_count);
  EXPECT_EQ(stats.layers[1].demand_bytes, expert_count * slot_bytes);
}

TEST(Runtime, prefill_reads_each_expert_of_a_layer_once_at_any_budget) {
  for (const SlotIndex slot_count : {2U, 3U, 4U, 7U, 9U, 16U, 20U, 24U}) {
    for (const std::uint32_t delay : {0U, 80U}) {
      SCOPED_TRACE(::testing::Message() << slot_count << " slots, delay " << delay);
      RuntimeOptions some = options(slot_count);
      some.link.faults = planted({.delay_seed = slot_count, .max_delay_us = delay});
      Runtime runtime{store(), some};
      std::mt19937 random{17};
      run(runtime, prefill(random));
      EXPECT_EQ(runtime.stats().link.bytes, all_slots * slot_bytes);
      for (const LayerStats& layer : runtime.stats().layers) {
        EXPECT_EQ(moved(layer), expert_count * slot_bytes);
        EXPECT_EQ(layer.prefetch_used_bytes, layer.prefetch_bytes);  // none was in vain
      }
      run(runtime, prefill(random));
      const std::uint64_t again = runtime.stats().link.bytes - all_slots * slot_bytes;
      EXPECT_LE(again, all_slots * slot_bytes);
      if (slot_count == all_slots) {
        EXPECT_EQ(again, 0u);
      }
    }
  }
}

TEST(Runtime, counters_add_up) {
  for (const SlotIndex slot_count : {2U, 6U, 17U}) {
    SCOPED_TRACE(::testing::Message() << slot_count << " slots");
    Runtime runtime{store(), options(slot_count)};
    const auto calls = conversation(18);
    std::uint64_t needed = 0;
    for (const LayerCall& call : calls) {
      std::vector<std::int64_t> experts = call.index;
      std::ranges::sort(experts);
      const auto repeated = std::ranges::unique(experts);
      experts.erase(repeated.begin(), repeated.end());
      needed += experts.size();
    }
    run(runtime, calls);
    runtime.close();  // nothing is in flight any more
    const RuntimeStats stats = runtime.stats();
    const LayerStats sum = total(runtime);
    EXPECT_EQ(sum.hits + sum.late + sum.misses, needed);
    // A cancelled prefetch that is needed again may arrive whole all the same.
    EXPECT_LE(sum.demand_bytes, sum.misses * slot_bytes);
    EXPECT_EQ(moved(sum), stats.link.bytes);
    EXPECT_LE(sum.prefetch_used_bytes, sum.prefetch_bytes);
    EXPECT_EQ(stats.slot_count, slot_count);
    EXPECT_LE(stats.resident_count, slot_count);
    EXPECT_FALSE(stats.isa.empty());
  }
}

TEST(Runtime, what_is_resident_moves_no_byte) {
  std::mt19937 random{19};
  Runtime runtime{store(), options(all_slots)};
  const LayerCall call = random_call(random, 2, 1);
  forward(runtime, call);
  const std::uint64_t once = runtime.stats().link.bytes;
  EXPECT_EQ(once, top_k * slot_bytes);
  forward(runtime, call);
  EXPECT_EQ(runtime.stats().link.bytes, once);
  EXPECT_EQ(runtime.stats().layers[2].hits, top_k);
}

TEST(Runtime, a_budget_under_one_wave_is_refused_with_the_bytes_it_needs) {
  RuntimeOptions tiny = options(2);
  --tiny.expert_memory_bytes;
  EXPECT_EQ(message_of<InvalidArgument>([&] { Runtime{store(), tiny}; }),
            "expert_memory of 4.5 KiB holds 1 experts of 2.2 KiB; one token needs 2 at once: give "
            "at least 4608 bytes (4.5 KiB)");
  tiny.expert_memory_bytes = 1;
  EXPECT_EQ(message_of<InvalidArgument>([&] { Runtime{store(), tiny}; }),
            "expert_memory of 1 bytes holds 0 experts of 2.2 KiB; one token needs 2 at once: give "
            "at least 4608 bytes (4.5 KiB)");
  tiny.experts_per_token = 9;
  EXPECT_EQ(message_of<InvalidArgument>([&] { Runtime{store(), tiny}; }),
            "experts_per_token is 9, but a layer has only 8 experts");
}

TEST(Runtime, a_budget_beyond_the_model_is_cut_to_it) {
  const Runtime runtime{store(), options(1'000'000)};
  EXPECT_EQ(runtime.stats().slot_count, all_slots);
}

TEST(Runtime, a_wrong_layer_index_or_score_count_is_refused_and_harms_nothing) {
  Runtime runtime{store(), options(4)};
  std::mt19937 random{20};
  LayerCall call = random_call(random, 3, 1);
  const std::string no_layer = "layer 3 asked, but the store has MoE layers 0 to 2";
  EXPECT_EQ(message_of<InvalidArgument>([&] { forward(runtime, call); }), no_layer);
  const std::vector<float> scores(expert_count + 1);
  EXPECT_EQ(message_of<InvalidArgument>([&] { runtime.predict(3, scores); }), no_layer);
  EXPECT_EQ(message_of<InvalidArgument>([&] { runtime.predict(0, scores); }),
            "9 scores given, but a layer has 8 experts");
  call = random_call(random, 0, 2);
  call.index[3] = expert_count;
  EXPECT_EQ(message_of<InvalidArgument>([&] { forward(runtime, call); }),
            "top_k_index[1, 1] is 8, but the layer has experts 0 to 7");
  EXPECT_EQ(runtime.stats().link.bytes, 0u);
  expect_same_bits(run(runtime, conversation(20)), 20);
}

TEST(Runtime, a_failed_read_fails_the_call_that_needs_it_once_with_the_expert_named) {
  std::mt19937 random{21};
  for (std::uint64_t chunk = 1; chunk <= 12; ++chunk) {
    SCOPED_TRACE(::testing::Message() << "chunk " << chunk);
    RuntimeOptions one_thread = options(4);
    one_thread.link.copy_threads = 1;  // the n-th chunk belongs to a known expert
    one_thread.link.faults = planted({.fail_at_chunk = chunk});
    Runtime runtime{store(), one_thread};
    LayerCall call = random_call(random, 1, 1);
    call.index = {6, 2};
    // Ascending experts; each blob is 3 extents of 768 bytes, each in 2 chunks.
    const std::string expert = chunk <= 6 ? "2" : "6";
    EXPECT_EQ(message_of<DeviceError>([&] { forward(runtime, call); }),
              "could not fill expert " + expert +
                  " of layer 1 (memory): read error injected by a test; the request fails, the "
                  "next one reads it again");
    const auto out = forward(runtime, call);
    const auto wanted = reference(*store(), call);
    for (std::size_t i = 0; i < out.size(); ++i) {
      ASSERT_NEAR(static_cast<double>(out[i]), wanted[i], 1e-4 * (1 + std::abs(wanted[i])));
    }
  }
}

TEST(Runtime, a_file_that_was_cut_off_is_named_and_read_again_once_it_is_whole) {
  const auto in_file = std::make_shared<FakeStore>(format, layer_count, expert_count);
  in_file->move_to_file();
  Runtime runtime{in_file, options(3)};
  std::mt19937 random{22};
  LayerCall call = random_call(random, 2, 1);
  call.index = {1, 7};
  in_file->cut_file_after({2, 7});
  for (int attempt = 0; attempt < 3; ++attempt) {
    const std::string message = message_of<DeviceError>([&] { forward(runtime, call); });
    EXPECT_TRUE(
        message.starts_with("could not fill expert 7 of layer 2 (fake.safetensors): the "
                            "file ends at byte "))
        << message;
    EXPECT_NE(message.find(", 1 bytes short: it was truncated after it was opened; the request "
                           "fails, the next one reads it again"),
              std::string::npos)
        << message;
  }
  in_file->mend_file();
  const auto out = forward(runtime, call);
  const auto wanted = reference(*in_file, call);
  for (std::size_t i = 0; i < out.size(); ++i) {
    ASSERT_NEAR(static_cast<double>(out[i]), wanted[i], 1e-4 * (1 + std::abs(wanted[i])));
  }
}

TEST(Runtime, a_failed_read_ahead_harms_nobody) {
  std::mt19937 random{23};
  RuntimeOptions one_thread = options(all_slots);
  one_thread.link.copy_threads = 1;
  one_thread.link.faults = planted();
  Runtime runtime{store(), one_thread};
  const auto calls = prefill(random);
  forward(runtime, calls[0]);  // all 48 chunks of layer 0 have been cut: others are read ahead
  one_thread.link.faults->plant({.fail_at_chunk = 1});
  int failures = 0;
  for (const LayerCall& call : {calls[1], calls[2], calls[1], calls[2]}) {
    try {
      forward(runtime, call);
    } catch (const DeviceError&) {
      ++failures;  // the call came while the copy was in flight
    }
  }
  EXPECT_LE(failures, 1);
  one_thread.link.faults->plant({});
  expect_same_bits(run(runtime, conversation(23)), 23);
}

TEST(Runtime, may_be_closed_twice_and_then_answers_only_stats) {
  Runtime runtime{store(), options(4)};
  const auto calls = conversation(24);
  run(runtime, calls);
  const std::uint64_t bytes = moved(total(runtime));
  runtime.close();
  runtime.close();
  const std::string closed = "this Runtime is closed; make a new one";
  const std::vector<float> scores(expert_count);
  EXPECT_EQ(message_of<Error>([&] { forward(runtime, calls[0]); }), closed);
  EXPECT_EQ(message_of<Error>([&] { runtime.predict(0, scores); }), closed);
  EXPECT_EQ(message_of<Error>([&] { runtime.end_iteration(0); }), closed);
  EXPECT_EQ(message_of<Error>([&] { runtime.begin_request(); }), closed);
  EXPECT_EQ(message_of<Error>([&] { runtime.set_limits({}); }), closed);
  EXPECT_EQ(message_of<Error>([&] { runtime.record_routing(true); }), closed);
  EXPECT_EQ(message_of<Error>([&] { static_cast<void>(runtime.recorded_routing()); }), closed);
  EXPECT_EQ(message_of<Error>([&] { runtime.replay_routing({layer_count, expert_count}); }),
            closed);
  EXPECT_EQ(message_of<Error>([&] { static_cast<void>(runtime.spans()); }), closed);
  EXPECT_EQ(message_of<Error>([&] { static_cast<void>(runtime.calibration()); }), closed);
  EXPECT_GE(moved(total(runtime)), bytes);
}

TEST(Runtime, gives_its_store_back_when_it_is_closed) {
  const auto own = std::make_shared<const FakeStore>(format, layer_count, expert_count);
  Runtime runtime{own, options(4)};
  EXPECT_GT(own.use_count(), 1);
  runtime.close();
  EXPECT_EQ(own.use_count(), 1);
}

/// How a child of this process ends that calls `act`: its exit status, or minus its signal.
template <class Act>
int status_of_child(Act act) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(30);
    ::_exit(act());
  }
  int status = 0;
  EXPECT_EQ(::waitpid(child, &status, 0), child);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

TEST(Runtime, answers_a_forked_child_at_once_whatever_its_threads_did_at_the_fork) {
  RuntimeOptions slow = options(4);
  slow.compute_threads = 2;
  slow.link.link_gbps = 1e-4;
  Runtime runtime{store(), slow};
  std::mt19937 random{33};
  const LayerCall call = prefill(random)[0];  // 184 ms on that link
  std::thread caller{[&] { forward(runtime, call); }};
  while (runtime.stats().link.busy_s == 0) std::this_thread::yield();
  for (const bool in_a_call : {true, false}) {
    EXPECT_EQ(status_of_child([&] {
                const std::vector<float> scores(expert_count);
                const std::string cure = "load after the fork, or start workers by the method";
                int refused = 0;
                const auto refuses = [&](auto act) {
                  refused += message_of<Error>(act).find(cure) != std::string::npos ? 1 : 0;
                };
                refuses([&] { forward(runtime, call); });
                refuses([&] { runtime.begin_request(); });
                refuses([&] { runtime.end_iteration(0); });
                refuses([&] { runtime.predict(0, scores); });
                refuses([&] { static_cast<void>(runtime.spans()); });
                refuses([&] { static_cast<void>(runtime.stats()); });
                runtime.close();
                refuses([&] { runtime.begin_request(); });
                return refused;
              }),
              7);
    if (in_a_call) caller.join();
  }
  EXPECT_NO_THROW(forward(runtime, call));
}

TEST(Runtime, may_go_while_copies_are_in_flight) {
  std::mt19937 random{25};
  const auto calls = prefill(random);
  for (int round = 0; round < 20; ++round) {
    RuntimeOptions slow = options(all_slots);
    slow.link.faults = planted({.delay_seed = 25, .max_delay_us = 100});
    Runtime runtime{store(), slow};
    forward(runtime, calls[0]);  // layer 1 is being read ahead
  }
}

TEST(Runtime, many_threads_may_call_at_once) {
  RuntimeOptions some = options(5);
  some.compute_threads = 2;
  Runtime runtime{store(), some};
  const auto calls = conversation(26);
  const auto& wanted = plain_outputs(26);
  std::atomic<int> wrong{0};
  std::atomic<bool> stop{false};
  std::vector<std::thread> callers;
  for (std::size_t start = 0; start < 3; ++start) {
    callers.emplace_back([&, start] {
      for (std::size_t i = start; i < calls.size(); ++i) {
        if (!same_bits(forward(runtime, calls[i]), wanted[i])) ++wrong;
      }
    });
  }
  std::vector<std::thread> others;
  others.emplace_back([&] {
    const std::vector<float> scores(expert_count, 0.1F);
    for (std::uint16_t layer = 0; !stop; layer = layer == 0 ? 2 : 0) {
      runtime.predict(layer, scores);
    }
  });
  others.emplace_back([&] {
    while (!stop) runtime.end_iteration(1);
  });
  others.emplace_back([&] {
    while (!stop) {
      const LayerStats sum = total(runtime);
      if (sum.prefetch_used_bytes > sum.prefetch_bytes) ++wrong;
    }
  });
  for (std::thread& caller : callers) caller.join();
  stop = true;
  for (std::thread& other : others) other.join();
  EXPECT_EQ(wrong, 0);
}

TEST(Runtime, a_failure_is_reported_to_the_call_that_needs_it_whatever_others_do_meanwhile) {
  std::mt19937 random{32};
  const LayerCall call = random_call(random, 1, 1);
  for (int round = 0; round < 300; ++round) {
    RuntimeOptions some = options(4);
    some.link.faults = planted({.fail_at_chunk = 1});
    Runtime runtime{store(), some};
    std::atomic<bool> done = false;
    std::thread other{[&] {
      while (!done) {
        runtime.begin_request();
        EXPECT_NO_THROW(runtime.end_iteration(0));
      }
    }};
    EXPECT_THROW(static_cast<void>(forward(runtime, call)), DeviceError);
    done = true;
    other.join();
  }
}

TEST(Runtime, may_be_closed_while_others_call) {
  for (int round = 0; round < 5; ++round) {
    Runtime runtime{store(), options(5)};
    std::atomic<int> calls_done{0};
    std::atomic<int> closed{0};
    const auto until_closed = [&](auto call) {
      return std::thread{[&, call] {
        try {
          for (;; ++calls_done) call();
        } catch (const Error&) {
          ++closed;
        }
      }};
    };
    std::mt19937 random{27};
    const LayerCall call = random_call(random, 1, 4);
    const std::vector<float> scores(expert_count);
    std::vector<std::thread> callers;
    callers.push_back(until_closed([&] { forward(runtime, call); }));
    callers.push_back(until_closed([&] { runtime.predict(0, scores); }));
    callers.push_back(until_closed([&] { runtime.end_iteration(0); }));
    while (calls_done < 20) std::this_thread::yield();
    runtime.close();
    for (std::thread& caller : callers) caller.join();
    EXPECT_EQ(closed, 3);
  }
}

TEST(Runtime, steady_decode_allocates_nothing_on_any_thread) {
  for (const SlotIndex slot_count : {3U, 10U}) {
    SCOPED_TRACE(::testing::Message() << slot_count << " slots");
    RuntimeOptions some = options(slot_count);
    some.compute_threads = 2;
    some.link.faults = planted();
    Runtime runtime{store(), some};
    const auto calls = conversation(28);
    std::mt19937 random{28};
    const std::vector<float> scores(expert_count, 0.5F);
    std::vector<float> out(calls[0].x.size());
    const auto pass = [&](std::size_t first) {
      for (std::size_t i = first; i < calls.size(); ++i) {
        const LayerCall& call = calls[i];
        runtime.predict(call.layer, scores);
        runtime.forward(call.layer, {.tokens = call.tokens,
                                     .k = call.k,
                                     .x = call.x.data(),
                                     .top_k_index = call.index.data(),
                                     .top_k_weights = call.weights.data(),
                                     .out = out.data()});
        if (call.layer + 1 == layer_count) runtime.end_iteration(1);
      }
    };
    // A slow link makes the queues as long as they get, a full house the groups of experts.
    some.link.faults->plant({.delay_seed = 28, .max_delay_us = 500});
    pass(0);
    some.link.faults->plant({});
    LayerCall resident = random_call(random, layer_count - 1, 8);  // reads nothing ahead
    const std::int64_t fitting = std::min<std::int64_t>(slot_count, expert_count);
    for (std::size_t i = 0; i < resident.index.size(); ++i) {
      resident.index[i] = static_cast<std::int64_t>(i) % fitting;
    }
    for (int round = 0; round < 2; ++round) forward(runtime, resident);
    const std::uint64_t bytes = runtime.stats().link.bytes;
    const std::size_t before = allocation_count();
    for (int round = 0; round < 3; ++round) pass(layer_count);  // all but the prompt
    EXPECT_EQ(allocation_count() - before, 0u);
    EXPECT_GT(runtime.stats().link.bytes, bytes);  // the link was in use
  }
}

TEST(Runtime, a_long_prompt_leaves_no_memory_behind_that_changes_the_next_call) {
  std::mt19937 random{29};
  Runtime runtime{store(), options(6)};
  forward(runtime, random_call(random, 0, 30'000));  // beyond what calls keep
  expect_same_bits(run(runtime, conversation(29)), 29);
}

}  // namespace
}  // namespace spmoe
