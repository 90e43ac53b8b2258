#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/error.hpp"
#include "device/cuda/handle.hpp"
#include "fake_cuda.hpp"
#include "layer_calls.hpp"
#include "message_of.hpp"
#include "policy_names.hpp"

namespace spmoe {
namespace {

using fake_cuda::Session;

/// Device memory of the caller, as torch's would be.
class DeviceArray {
 public:
  explicit DeviceArray(std::size_t bytes) : bytes_{bytes} {
    void* raw = nullptr;
    SPMOE_CUDA_TRY(cudaMalloc(&raw, std::max<std::size_t>(bytes, 1)));
    data_ = cuda::UniqueHandle<void*, cudaFree>{raw};
  }
  template <class T>
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray{values.size() * sizeof(T)} {
    if (bytes_ > 0) std::memcpy(data_.get(), values.data(), bytes_);
  }

  template <class T>
  [[nodiscard]] T* as() const {
    return static_cast<T*>(data_.get());
  }
  [[nodiscard]] std::vector<float> floats() const {
    const std::size_t count = bytes_ / sizeof(float);
    return {as<float>(), as<float>() + count};
  }

 private:
  cuda::UniqueHandle<void*, cudaFree> data_;
  std::size_t bytes_;
};

/// A caller with a stream of its own, or the default one, who reads results at the end alone.
class Caller {
 public:
  explicit Caller(bool own_stream = true) {
    if (own_stream) stream_ = cuda::make_stream();
  }
  ~Caller() { static_cast<void>(cudaStreamSynchronize(stream_.get())); }
  Caller(const Caller&) = delete;
  Caller& operator=(const Caller&) = delete;

  /// `from` is the device that is the thread's current one meanwhile.
  void forward(Runtime& runtime, const LayerCall& call, int from = 0) {
    const Pending& it = *pending_.emplace_back(std::make_unique<Pending>(call));
    if (stream_.get() == nullptr) route(it);
    const cuda::CurrentDevice current{from};
    runtime.forward(call.layer, {.tokens = call.tokens,
                                 .k = call.k,
                                 .x = it.x.as<float>(),
                                 .top_k_index = it.index.as<std::int64_t>(),
                                 .top_k_weights = it.weights.as<float>(),
                                 .out = it.out.as<float>(),
                                 .consumer = consumer()});
  }

  void predict(Runtime& runtime, std::uint16_t layer, const std::vector<float>& scores) {
    const DeviceArray& held = *scores_.emplace_back(std::make_unique<DeviceArray>(scores));
    runtime.predict(layer, held.as<float>(), PredictionSource::draft, consumer());
  }

  /// Results of the calls since the last time.
  std::vector<std::vector<float>> results() {
    SPMOE_CUDA_TRY(cudaStreamSynchronize(stream_.get()));
    std::vector<std::vector<float>> outs;
    for (const auto& it : pending_) outs.push_back(it->out.floats());
    pending_.clear();
    scores_.clear();
    return outs;
  }

  [[nodiscard]] cudaStream_t stream() const { return stream_.get(); }
  [[nodiscard]] std::uintptr_t consumer() const {
    return reinterpret_cast<std::uintptr_t>(stream_.get());
  }

 private:
  struct Pending {
    explicit Pending(const LayerCall& call)
        : x{call.x},
          index{call.index},
          weights{call.weights},
          out{std::vector<float>(call.x.size(), std::nanf(""))},
          choices{call.index.size()} {}
    DeviceArray x, index, weights, out;
    std::size_t choices;
  };
  /// The router's work on the default stream: until it has run, the choice is not there.
  void route(const Pending& it) const {
    auto* index = it.index.as<std::int64_t>();
    const std::vector<std::int64_t> chosen{index, index + it.choices};
    std::fill_n(index, it.choices, 0);
    cuda::check(
        fake_cuda::launch(nullptr, {}, [index, chosen] { std::ranges::copy(chosen, index); }),
        "launch of the router");
  }

  cuda::Stream stream_;
  std::vector<std::unique_ptr<Pending>> pending_;
  std::vector<std::unique_ptr<DeviceArray>> scores_;
};

RuntimeOptions cuda_options(SlotIndex slot_count, std::uint64_t pinned_bytes = 0) {
  RuntimeOptions result = options(slot_count);
  result.device = "cuda:0";
  result.pinned_memory_bytes = pinned_bytes;
  return result;
}

constexpr std::uint64_t all_pinned = all_slots * slot_bytes;

/// Scores that name what `calls` will need at `from` and after, and something that they will not.
std::vector<float> scores_for(const LayerCall& call, std::mt19937& random) {
  std::vector<float> scores(expert_count, 0.01F);
  for (const std::int64_t expert : call.index) scores[static_cast<std::size_t>(expert)] += 1.0F;
  scores[random() % expert_count] += 1.5F;
  return scores;
}

/// Runs `calls` with predictions from the device, and reads the results at the end of iterations.
std::vector<std::vector<float>> converse(Runtime& runtime, Caller& caller,
                                         const std::vector<LayerCall>& calls) {
  std::mt19937 random{7};
  std::vector<std::vector<float>> outs;
  for (std::size_t first = 0; first < calls.size(); first += layer_count) {
    for (std::size_t i = first; i < first + layer_count; ++i) {
      caller.predict(runtime, calls[i].layer, scores_for(calls[i], random));
    }
    for (std::size_t i = first; i < first + layer_count; ++i) caller.forward(runtime, calls[i]);
    for (auto& out : caller.results()) outs.push_back(std::move(out));
    runtime.end_iteration(1);
  }
  return outs;
}

/// Where the blobs rest.
struct Tier {
  const char* name;
  bool file;
  std::uint64_t pinned_bytes;
};
constexpr std::array tiers{Tier{"memory", false, 0}, Tier{"pinned", true, all_pinned},
                           Tier{"half_pinned", true, all_pinned / 2}};

std::shared_ptr<const FakeStore> store_in(const Tier& tier) {
  if (!tier.file) return store();
  auto filed = std::make_shared<FakeStore>(format, layer_count, expert_count);
  filed->move_to_file();
  return filed;
}

class CudaLossless : public ::testing::TestWithParam<std::string> {};

TEST_P(CudaLossless, gives_the_host_s_bits_at_every_eviction_budget_and_tier) {
  std::uint32_t round = 0;
  for (const std::string_view eviction : eviction_policy_names()) {
    for (const SlotIndex slots : {SlotIndex{2}, SlotIndex{5}, SlotIndex{13}, all_slots}) {
      const Tier& tier = tiers[++round % tiers.size()];
      SCOPED_TRACE(std::string{eviction} + ", " + std::to_string(slots) + " slots, " + tier.name);
      const Session session{{.delay_seed = round, .max_delay_us = 40}};
      RuntimeOptions some = cuda_options(slots, tier.pinned_bytes);
      some.policies = {GetParam(), std::string{eviction}};
      Runtime runtime{store_in(tier), some};
      Caller caller{round % 2 == 0};
      const std::uint32_t seed = 40 + round % 3;
      const auto calls = conversation(seed);
      if (prefetch_policy(some.policies).replays || eviction_policy(some.policies).replays) {
        Runtime host{store(), options(all_slots)};
        host.record_routing(true);
        static_cast<void>(run(host, calls));
        runtime.replay_routing(host.recorded_routing());
      }
      expect_same_bits(converse(runtime, caller, calls), seed);
      const RuntimeStats stats = runtime.stats();
      EXPECT_EQ(stats.device, "cuda:0");
      EXPECT_GE(moved(total(runtime)), std::uint64_t{all_slots} * slot_bytes);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(policies, CudaLossless, ::testing::ValuesIn(prefetch_policy_names()),
                         [](const auto& test) { return test_name(test.param); });

TEST(CudaRuntime, counts_every_byte_once_all_copies_have_arrived) {
  const Session session;
  RuntimeOptions some = cuda_options(5, all_pinned);
  some.policies.prefetch = "horizon";
  Runtime runtime{store(), some};
  Caller caller;
  static_cast<void>(converse(runtime, caller, conversation(50)));
  RuntimeStats stats = runtime.stats();
  while (stats.queue_depth > 0 || stats.link.bytes != moved(total(runtime))) {
    std::this_thread::yield();  // prefetches that nobody waits for are still in flight
    stats = runtime.stats();
  }
  EXPECT_GT(total(runtime).predictions, 0u) << "no scores were read back";
  EXPECT_EQ(stats.pinned_bytes, all_pinned);
}

TEST(CudaRuntime, never_waits_on_the_host_for_bytes) {
  // One call a layer: for the router's choice. Events, copies and kernels are ordered on the
  // device.
  const Session session{{.max_delay_us = 200}};
  Runtime runtime{store(), cuda_options(6, all_pinned)};
  Caller caller;
  const auto calls = conversation(51);
  for (const LayerCall& call : calls) caller.forward(runtime, call);
  EXPECT_GT(session.calls("cudaStreamWaitEvent"), calls.size());
  EXPECT_EQ(session.calls("cudaStreamSynchronize"), 0u);
  expect_same_bits(caller.results(), 51);
}

TEST(CudaRuntime, may_be_called_on_streams_by_turns) {
  const Session session{{.max_delay_us = 100}};
  Runtime runtime{store(), cuda_options(6, all_pinned)};
  std::array<Caller, 3> callers;
  const auto calls = conversation(52);
  std::array<std::vector<std::size_t>, 3> whose;
  for (std::size_t i = 0; i < calls.size(); ++i) {
    callers[i % 3].forward(runtime, calls[i]);
    whose[i % 3].push_back(i);
  }
  std::vector<std::vector<float>> outs(calls.size());
  for (std::size_t who = 0; who < 3; ++who) {
    auto results = callers[who].results();
    for (std::size_t i = 0; i < results.size(); ++i) outs[whose[who][i]] = std::move(results[i]);
  }
  expect_same_bits(outs, 52);
}

TEST(CudaRuntime, computes_on_the_default_stream_of_its_own_device) {
  const Session session{{.device_count = 2, .max_delay_us = 200}};
  RuntimeOptions second = cuda_options(6, all_pinned);
  second.device = "cuda:1";
  Runtime runtime{store(), second};
  EXPECT_EQ(runtime.stats().device, "cuda:1");
  std::vector<std::vector<float>> outs;
  {
    const cuda::CurrentDevice current{1};
    Caller caller{/*own_stream=*/false};
    const auto calls = conversation(55);
    for (const LayerCall& call : calls) {
      // The work that makes the choice is queued on cuda:1; then the caller's thread is back on
      // cuda:0.
      caller.forward(runtime, call, 0);
    }
    outs = caller.results();
  }
  expect_same_bits(outs, 55);
}

TEST(CudaRuntime, predictions_of_a_request_that_was_given_up_are_dropped) {
  const Session session;
  RuntimeOptions some = cuda_options(6);
  some.policies.prefetch = "sp-moe";
  Runtime runtime{store(), some};
  Caller caller;
  std::atomic<bool> go = false;
  cuda::check(fake_cuda::launch(caller.stream(), {},
                                [&] {
                                  while (!go) std::this_thread::yield();
                                }),
              "launch");
  runtime.begin_request();
  caller.predict(runtime, 2, std::vector<float>(expert_count, 2.0F));
  runtime.begin_request();
  go = true;
  while (runtime.stats().dropped_predictions == 0) std::this_thread::yield();
  EXPECT_EQ(total(runtime).predictions, 0u);
  static_cast<void>(caller.results());
}

TEST(CudaRuntime, copies_one_by_one_for_a_driver_that_takes_no_batches) {
  for (const int driver : {12070, 13000}) {
    const Session session{{.driver_version = driver}};
    RuntimeOptions whole = cuda_options(6, all_pinned);
    whole.link.chunk_bytes = 2 * slot_bytes;
    Runtime runtime{store(), whole};
    Caller caller;
    expect_same_bits(converse(runtime, caller, conversation(56)), 56);
    EXPECT_EQ(session.calls("cudaMemcpyBatchAsync") > 0, driver >= 12080);
  }
}

TEST(CudaRuntime, a_paced_link_lets_nobody_read_before_the_bytes_would_be_there) {
  const Session session;
  RuntimeOptions slow = cuda_options(6, all_pinned);
  slow.link.link_gbps = 0.5;
  Runtime runtime{store(), slow};
  Caller caller;
  expect_same_bits(converse(runtime, caller, conversation(53)), 53);
  EXPECT_GT(total(runtime).stall_s, 0.0);
}

TEST(CudaRuntime, pins_what_the_system_lets_it_pin_and_fetches_the_rest_from_the_file) {
  const auto filed = std::make_shared<FakeStore>(format, layer_count, expert_count);
  filed->move_to_file();
  const Session session{{.pinned_bytes = 30 << 10}};  // some of it is for bounce buffers
  std::uint64_t reported = 0;
  RuntimeOptions some = cuda_options(6, all_pinned);
  some.pinned_progress = [&](std::uint64_t done, std::uint64_t whole) {
    EXPECT_LE(reported, done);
    EXPECT_LE(done, whole);
    reported = done;
  };
  Runtime runtime{filed, some};
  const std::uint64_t pinned = runtime.stats().pinned_bytes;
  EXPECT_GT(pinned, 0u);
  EXPECT_LT(pinned, all_pinned);
  EXPECT_EQ(pinned % slot_bytes, 0u);
  EXPECT_EQ(reported, pinned);
  Caller caller;
  expect_same_bits(converse(runtime, caller, conversation(54)), 54);
}

TEST(CudaRuntime, a_blob_that_cannot_be_pinned_is_named_and_nothing_is_left_behind) {
  const auto filed = std::make_shared<FakeStore>(format, layer_count, expert_count);
  filed->move_to_file();
  filed->cut_file_after({1, 3});
  const Session session;
  EXPECT_NE(message_of<DeviceError>([&] {
              Runtime{filed, cuda_options(6, all_pinned)};
            }).find("(fake.safetensors): the file ends at byte"),
            std::string::npos);
}

TEST(CudaRuntime, too_little_device_memory_is_refused_with_what_is_asked_and_free) {
  const Session session{{.memory_bytes = 20'000}};
  EXPECT_EQ(message_of<OutOfMemory>([] { Runtime{store(), cuda_options(all_slots)}; }),
            "no memory for 54.0 KiB on cuda:0: 19.5 KiB free of 19.5 KiB; lower expert_memory");
}

// Faults in the middle of decoding fail the request that meets them, and no other.

/// Runs a conversation in which something fails. Then the next, which must be right.
std::string error_of_one_request(const Session& session, Runtime& runtime) {
  Caller caller;
  runtime.begin_request();
  const std::string message = message_of<DeviceError>(
      [&] { static_cast<void>(converse(runtime, caller, conversation(60))); });
  static_cast<void>(caller.results());
  runtime.begin_request();
  expect_same_bits(converse(runtime, caller, conversation(61)), 61);
  EXPECT_GT(session.calls("cudaLaunchKernel"), 0u);
  return message;
}

TEST(CudaRuntime, a_copy_that_is_refused_fails_one_request) {
  Session session;
  Runtime runtime{store(), cuda_options(6, all_pinned)};
  session.fail("cudaMemcpyAsync", 30, cudaErrorUnknown);
  const std::string message = error_of_one_request(session, runtime);
  EXPECT_NE(message.find("could not fill expert"), std::string::npos) << message;
  EXPECT_NE(message.find("cudaErrorUnknown"), std::string::npos) << message;
  EXPECT_NE(message.find("bytes to cuda:0; the request fails, the next one reads it again"),
            std::string::npos)
      << message;
}

TEST(CudaRuntime, a_copy_that_fails_in_flight_fails_one_request_though_compute_had_begun) {
  int failed = 0;
  for (const std::uint64_t nth : {150U, 160U, 170U, 180U, 190U, 200U, 210U}) {
    Session session;
    Runtime runtime{store(), cuda_options(6, all_pinned)};
    session.fail_copy_in_flight(nth);
    Caller caller;
    runtime.begin_request();
    try {
      // A copy of an expert that a prompt read ahead and no layer used spoils nothing.
      expect_same_bits(converse(runtime, caller, conversation(60)), 60);
    } catch (const DeviceError& error) {
      ++failed;
      const std::string message = error.what();
      EXPECT_NE(message.find("failed in flight: cudaErrorUnknown"), std::string::npos) << message;
    }
    static_cast<void>(caller.results());
    runtime.begin_request();
    expect_same_bits(converse(runtime, caller, conversation(61)), 61);
  }
  EXPECT_GE(failed, 3);
}

TEST(CudaRuntime, a_launch_that_fails_fails_one_request) {
  Session session;
  Runtime runtime{store(), cuda_options(6, all_pinned)};
  session.fail("cudaLaunchKernel", 25, cudaErrorLaunchFailure);
  EXPECT_EQ(error_of_one_request(session, runtime),
            "launch of an expert kernel: cudaErrorLaunchFailure (cudaErrorLaunchFailure)");
}

TEST(CudaRuntime, says_that_the_process_must_be_restarted_once_its_context_is_broken) {
  const std::string cure =
      "cuda:0 is lost to this process, for an error broke its CUDA context "
      "(cudaErrorIllegalAddress (cudaErrorIllegalAddress)): restart the process";
  for (const std::uint64_t nth : {1U, 40U, 150U, 180U}) {
    SCOPED_TRACE(::testing::Message() << "copy " << nth);
    Session session;
    std::mt19937 random{60};
    const LayerCall call = prefill(random)[0];  // all experts, which do not fit
    const DeviceArray x{call.x};
    const DeviceArray index{call.index};
    const DeviceArray weights{call.weights};
    const DeviceArray out{call.x};
    Runtime runtime{store(), cuda_options(6, all_pinned)};
    session.lose_context_at_copy(nth, cudaErrorIllegalAddress);
    const auto forward_once = [&] {
      runtime.forward(0, {.tokens = call.tokens,
                          .k = call.k,
                          .x = x.as<float>(),
                          .top_k_index = index.as<std::int64_t>(),
                          .top_k_weights = weights.as<float>(),
                          .out = out.as<float>()});
    };
    const std::string message = message_of<DeviceError>([&] {
      for (int pass = 0; pass < 100; ++pass) {
        forward_once();
        runtime.end_iteration(1);
      }
    });
    EXPECT_TRUE(message.ends_with(cure)) << message;
    EXPECT_EQ(message.find("the next one reads it again"), std::string::npos) << message;
    // From now on at once, whatever is asked.
    const auto copies = session.calls("cudaMemcpyAsync");
    const std::vector<float> scores(expert_count);
    EXPECT_EQ(message_of<DeviceError>(forward_once), cure);
    EXPECT_EQ(message_of<DeviceError>([&] { runtime.begin_request(); }), cure);
    EXPECT_EQ(message_of<DeviceError>([&] { static_cast<void>(runtime.spans()); }), cure);
    EXPECT_EQ(message_of<DeviceError>([&] { runtime.predict(0, scores); }), cure);
    EXPECT_EQ(message_of<DeviceError>([&] { runtime.end_iteration(0); }), cure);
    EXPECT_EQ(session.calls("cudaMemcpyAsync"), copies);
    EXPECT_EQ(runtime.stats().device, "cuda:0");
  }
}

TEST(CudaRuntime, gives_everything_back_when_it_is_closed) {
  const Session session;
  Caller caller;
  Runtime runtime{store(), cuda_options(6, all_pinned)};
  for (const LayerCall& call : conversation(62)) caller.forward(runtime, call);
  expect_same_bits(caller.results(), 62);
  runtime.close();
  std::size_t free_bytes = 0;
  std::size_t total_bytes = 0;
  SPMOE_CUDA_TRY(cudaMemGetInfo(&free_bytes, &total_bytes));
  EXPECT_EQ(free_bytes, total_bytes);
  EXPECT_EQ(session.leftovers(), "1 streams");  // the caller's
  EXPECT_GE(runtime.stats().link.bytes, std::uint64_t{all_slots} * slot_bytes);
}

// The purpose of the fake: each wait of the backend, left out, is noticed.

struct Mutation {
  const char* name;
  Session::Wait forgotten;
  bool of_caller;  ///< on the caller's stream, or on those that copy
  const char* complaint;
};

class CudaMutation : public ::testing::TestWithParam<Mutation> {};

TEST_P(CudaMutation, a_missing_wait_is_noticed) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "the race is real, and the thread sanitizer ends the test for it";
#endif
  Session session{{.max_delay_us = 300}};
  std::vector<std::string> violations;
  {
    Runtime runtime{store(), cuda_options(4, all_pinned)};
    Caller caller;
    session.forget(GetParam().forgotten, [&](cudaStream_t stream) {
      return (stream == caller.stream()) == GetParam().of_caller;
    });
    const auto calls = conversation(70);
    try {
      for (const LayerCall& call : calls) caller.forward(runtime, call);
    } catch (const Error&) {
      violations.emplace_back("other bits");  // taken for a choice, one that cannot be
    }
    for (auto& violation : session.take_violations()) violations.push_back(std::move(violation));
    const auto outs = caller.results();
    session.remember();
    const auto& wanted = plain_outputs(70);
    for (std::size_t i = 0; i < outs.size(); ++i) {
      if (!same_bits(outs[i], wanted[i])) violations.emplace_back("other bits");
    }
  }
  static_cast<void>(session.take_violations());
  EXPECT_TRUE(std::ranges::count(violations, GetParam().complaint)) << [&] {
    std::string all = "no such complaint among";
    for (const std::string& violation : violations) all += "\n" + violation;
    return all;
  }();
}

INSTANTIATE_TEST_SUITE_P(
    all, CudaMutation,
    ::testing::Values(Mutation{"compute_before_its_fill", Session::Wait::of_stream, true,
                               "read while its fill may be in flight"},
                      Mutation{"refill_before_the_last_use", Session::Wait::of_stream, false,
                               "written while it may be read"},
                      Mutation{"choice_read_before_it_arrived", Session::Wait::of_host, true,
                               "other bits"},
                      Mutation{"completion_before_the_copy_arrived", Session::Wait::of_host, false,
                               "read while its fill may be in flight"}),
    [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace spmoe
