#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "schedule/eviction/eviction_policy.hpp"

// Each policy is a rank of the candidates. The lowest one is evicted, of equals the lowest slot.
namespace spmoe {
namespace {

template <class Rank>
SlotIndex lowest(std::span<const Candidate> candidates, const Rank& rank) {
  const auto with_slot = [&](const Candidate& it) { return std::pair{rank(it), it.slot}; };
  return std::ranges::min_element(candidates, {}, with_slot)->slot;
}

/// Evicts by `rank(resident, current_layer)`.
template <class Rank>
class ByExpert final : public EvictionPolicy {
 public:
  explicit ByExpert(Rank rank) : rank_{std::move(rank)} {}

  SlotIndex victim(std::span<const Candidate> candidates, std::uint16_t current_layer) override {
    return lowest(candidates,
                  [&](const Candidate& it) { return rank_(it.resident, current_layer); });
  }

 private:
  Rank rank_;
};

/// The latest use or fill of a slot.
struct Touch {
  std::uint64_t uses = 0;  ///< since the slot was filled
  std::uint64_t time = 0;
  bool this_pass = false;
};

/// Evicts by `rank(touch, resident, current_layer)`.
template <class Rank>
class ByTouch final : public EvictionPolicy {
 public:
  ByTouch(SlotIndex slot_count, Rank rank) : touches_(slot_count), rank_{std::move(rank)} {}

  void on_fill(SlotIndex slot, ExpertId) override { touches_[slot] = {0, ++clock_, true}; }
  void on_use(SlotIndex slot) override {
    touches_[slot] = {touches_[slot].uses + 1, ++clock_, true};
  }
  void on_end_iteration() override {
    for (Touch& touch : touches_) touch.this_pass = false;
  }

  SlotIndex victim(std::span<const Candidate> candidates, std::uint16_t current_layer) override {
    return lowest(candidates, [&](const Candidate& it) {
      return rank_(touches_[it.slot], it.resident, current_layer);
    });
  }

 private:
  std::vector<Touch> touches_;  // by slot
  std::uint64_t clock_ = 0;
  Rank rank_;
};

template <class Rank>
std::unique_ptr<EvictionPolicy> by_expert(Rank rank) {
  return std::make_unique<ByExpert<Rank>>(std::move(rank));
}

template <class Rank>
std::unique_ptr<EvictionPolicy> by_touch(const PolicyView& view, Rank rank) {
  return std::make_unique<ByTouch<Rank>>(view.shape.slot_count, std::move(rank));
}

int layers_until_use(const PolicyView& view, ExpertId expert, std::uint16_t current_layer) {
  const int layers = view.shape.layer_count;
  return (expert.layer + layers - current_layer) % layers;
}

}  // namespace

std::unique_ptr<EvictionPolicy> make_lru(const PolicyView& view) {
  return by_touch(view, [](const Touch& touch, ExpertId, std::uint16_t) { return touch.time; });
}

std::unique_ptr<EvictionPolicy> make_lfu(const PolicyView& view) {
  return by_touch(view, [](const Touch& touch, ExpertId, std::uint16_t) {
    return std::pair{touch.uses, touch.time};
  });
}

std::unique_ptr<EvictionPolicy> make_next_use(const PolicyView& view) {
  return by_touch(view, [view](const Touch& touch, ExpertId expert, std::uint16_t current_layer) {
    return std::pair{-layers_until_use(view, expert, current_layer), touch.time};
  });
}

std::unique_ptr<EvictionPolicy> make_least_stale(const PolicyView& view) {
  return by_touch(view, [view](const Touch& touch, ExpertId expert, std::uint16_t current_layer) {
    if (touch.this_pass) return std::tuple{1, 0, touch.time};
    const bool behind = expert.layer < current_layer;
    return std::tuple{0, expert.layer + (behind ? 0 : view.shape.layer_count), touch.time};
  });
}

std::unique_ptr<EvictionPolicy> make_predicted_use(const PolicyView& view) {
  return by_expert([view](ExpertId expert, std::uint16_t current_layer) {
    return std::pair{view.forecast.value(expert, current_layer),
                     -layers_until_use(view, expert, current_layer)};
  });
}

std::unique_ptr<EvictionPolicy> make_activation_reuse(const PolicyView& view) {
  return by_expert([view](ExpertId expert, std::uint16_t) {
    const auto layers = static_cast<float>(view.shape.layer_count);
    // The source's small constant keeps the order of layers among experts never seen.
    return (view.history.share(expert) + 1e-3F) * (1 - static_cast<float>(expert.layer) / layers);
  });
}

std::unique_ptr<EvictionPolicy> make_belady(const PolicyView& view) {
  return by_expert([view](ExpertId expert, std::uint16_t) {
    return RoutingTrace::never - view.trace.next_use(expert);
  });
}

}  // namespace spmoe
