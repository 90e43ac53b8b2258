#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "base/types.hpp"
#include "schedule/policy_view.hpp"

namespace spmoe {

/// A slot the cache is willing to give up: resident, not leased, no copy in flight.
struct Candidate {
  SlotIndex slot;
  ExpertId resident;
};

/// Chooses which resident expert leaves the device when a slot is needed.
/// Holds ordering only; the slot table and leases belong to the scheduler, which calls it.
/// Implementations need no lock and must not call back.
class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;

  /// `expert` became resident in `slot`.
  virtual void on_fill(SlotIndex /*slot*/, ExpertId /*expert*/) {}

  /// The target's router selected the expert in `slot`.
  virtual void on_use(SlotIndex /*slot*/) {}

  /// A pass of the target over its layers is over.
  virtual void on_end_iteration() {}

  /// Returns an element of `candidates` (never empty), considering that `current_layer` is about
  /// to run. Equal candidates resolve to the lowest slot, so that runs are repeatable.
  [[nodiscard]] virtual SlotIndex victim(std::span<const Candidate> candidates,
                                         std::uint16_t current_layer) = 0;
};

/// Evicts the expert whose last use or fill is longest ago.
std::unique_ptr<EvictionPolicy> make_lru(const PolicyView& view);

/// Evicts the expert used least often since it was filled, the longest unused of equals.
std::unique_ptr<EvictionPolicy> make_lfu(const PolicyView& view);

/// Evicts the expert whose layer runs again latest, oldest use first within a layer.
/// A forward pass visits layers in order, so the layer just finished is needed last: Belady's
/// rule with the layer order standing in for the future.
std::unique_ptr<EvictionPolicy> make_next_use(const PolicyView& view);

/// Evicts what this pass has not touched before what it has: first, in order of layers, experts of
/// layers that this pass has left behind, then of layers to come, then what it touched, oldest
/// first. Source: SpecMD, arXiv:2602.03921 ("Least-Stale").
std::unique_ptr<EvictionPolicy> make_least_stale(const PolicyView& view);

/// Evicts the expert least likely to be used when its layer next runs, by draft predictions where
/// there are some and by frequency elsewhere. An expert used once is thus on probation: it has no
/// frequency to stay by, and leaves before those that come back. Of equals, the layer that runs
/// again latest goes first.
std::unique_ptr<EvictionPolicy> make_predicted_use(const PolicyView& view);

/// Evicts the expert with the lowest share of the nearest past request's activations, early layers
/// kept longer. Source: MoE-Infinity, arXiv:2401.14361, section 5.
std::unique_ptr<EvictionPolicy> make_activation_reuse(const PolicyView& view);

/// Belady: evicts the expert whose next use in the trace is furthest away.
std::unique_ptr<EvictionPolicy> make_belady(const PolicyView& view);

}  // namespace spmoe
