#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "device/copy/faulty_movers.hpp"
#include "fake_store.hpp"
#include "runtime/runtime.hpp"

/// A small model, calls of its layers as a conversation makes them, and what these give.
namespace spmoe {

inline constexpr BlobFormat format{.hidden = 24, .inter = 16, .dtype = DType::bf16};  // 2304 bytes
inline constexpr std::uint16_t layer_count = 3;
inline constexpr std::uint16_t expert_count = 8;
inline constexpr std::uint32_t top_k = 2;
inline constexpr std::uint64_t slot_bytes = 2304;
inline constexpr SlotIndex all_slots = layer_count * expert_count;
static_assert(format.bytes() == slot_bytes);

inline const std::shared_ptr<const FakeStore>& store() {
  static const auto shared = std::make_shared<const FakeStore>(format, layer_count, expert_count);
  return shared;
}

/// Small chunks, so that each blob is several on the link.
inline RuntimeOptions options(SlotIndex slot_count) {
  RuntimeOptions result;
  result.expert_memory_bytes = slot_count * slot_bytes;
  result.experts_per_token = top_k;
  result.compute_threads = 1;
  result.link.copy_threads = 2;
  result.link.chunk_bytes = 500;
  return result;
}

/// Faults to plant in the link of a runtime.
inline std::shared_ptr<FaultPlan> planted(const LinkFaults& faults = {}) {
  return std::make_shared<FaultPlan>(faults);
}

/// One call of a layer.
struct LayerCall {
  std::uint16_t layer;
  std::uint32_t tokens;
  std::uint32_t k;
  std::vector<float> x;
  std::vector<std::int64_t> index;
  std::vector<float> weights;
};

inline LayerCall random_call(std::mt19937& random, std::uint16_t layer, std::uint32_t tokens,
                             std::uint32_t k = top_k) {
  LayerCall call{layer, tokens, k, {}, {}, {}};
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> weight{0.1F, 1.0F};
  call.x.resize(std::size_t{tokens} * format.hidden);
  std::ranges::generate(call.x, [&] { return normal(random); });
  std::vector<std::int64_t> experts(expert_count);
  std::iota(experts.begin(), experts.end(), 0);
  for (std::uint32_t token = 0; token < tokens; ++token) {
    std::ranges::shuffle(experts, random);
    call.index.insert(call.index.end(), experts.begin(), experts.begin() + k);
    for (std::uint32_t i = 0; i < k; ++i) call.weights.push_back(weight(random));
  }
  return call;
}

/// A pass over all layers by so many rows that every expert of every layer is needed.
inline std::vector<LayerCall> prefill(std::mt19937& random) {
  std::vector<LayerCall> calls;
  for (std::uint16_t layer = 0; layer < layer_count; ++layer) {
    calls.push_back(random_call(random, layer, 40));
    for (std::size_t i = 0; i < expert_count; ++i) {
      calls.back().index[2 * i] = static_cast<std::int64_t>(i);
    }
  }
  return calls;
}

/// A prompt and some verifications of 1 to 5 positions.
inline std::vector<LayerCall> conversation(std::uint32_t seed) {
  std::mt19937 random{seed};
  std::vector<LayerCall> calls = prefill(random);
  for (int iteration = 0; iteration < 8; ++iteration) {
    const auto tokens = static_cast<std::uint32_t>(1 + random() % 5);
    for (std::uint16_t layer = 0; layer < layer_count; ++layer) {
      calls.push_back(random_call(random, layer, tokens));
    }
  }
  return calls;
}

inline std::vector<float> forward(Runtime& runtime, const LayerCall& call) {
  std::vector<float> out(call.x.size(), std::nanf(""));
  LayerArgs args;
  args.tokens = call.tokens;
  args.k = call.k;
  args.x = call.x.data();
  args.top_k_index = call.index.data();
  args.top_k_weights = call.weights.data();
  args.out = out.data();
  runtime.forward(call.layer, args);
  return out;
}

inline std::vector<std::vector<float>> run(Runtime& runtime, const std::vector<LayerCall>& calls) {
  std::vector<std::vector<float>> outs;
  for (const LayerCall& call : calls) {
    outs.push_back(forward(runtime, call));
    if (call.layer + 1 == layer_count) runtime.end_iteration(1);
  }
  return outs;
}

/// Result of `conversation(seed)` with everything resident, one thread at each place.
inline const std::vector<std::vector<float>>& plain_outputs(std::uint32_t seed) {
  static std::vector<std::pair<std::uint32_t, std::vector<std::vector<float>>>> known;
  for (const auto& [of, outs] : known) {
    if (of == seed) return outs;
  }
  RuntimeOptions plain = options(all_slots);
  plain.link.copy_threads = 1;
  Runtime runtime{store(), plain};
  return known.emplace_back(seed, run(runtime, conversation(seed))).second;
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

inline void expect_same_bits(const std::vector<std::vector<float>>& outs, std::uint32_t seed) {
  const auto& wanted = plain_outputs(seed);
  ASSERT_EQ(outs.size(), wanted.size());
  for (std::size_t i = 0; i < outs.size(); ++i) {
    ASSERT_TRUE(same_bits(outs[i], wanted[i])) << "call " << i << ", seed " << seed;
  }
}

inline LayerStats total(const Runtime& runtime) {
  LayerStats sum;
  for (const LayerStats& layer : runtime.stats().layers) sum += layer;
  return sum;
}

inline std::uint64_t moved(const LayerStats& stats) {
  return stats.demand_bytes + stats.prefetch_bytes;
}

}  // namespace spmoe
