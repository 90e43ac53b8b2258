#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "base/types.hpp"

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

  [[nodiscard]] virtual std::string_view name() const noexcept = 0;

  /// `expert` became resident in `slot`.
  virtual void on_fill(SlotIndex slot, ExpertId expert) = 0;

  /// The target's router selected the expert in `slot`.
  virtual void on_use(SlotIndex slot) = 0;

  /// Returns an element of `candidates` (never empty), considering that `current_layer` is about
  /// to run. Equal candidates resolve to the lowest slot, so that runs are repeatable.
  [[nodiscard]] virtual SlotIndex victim(std::span<const Candidate> candidates,
                                         std::uint16_t current_layer) = 0;
};

/// Evicts the expert whose last use or fill is longest ago.
std::unique_ptr<EvictionPolicy> make_lru(SlotIndex slot_count);

}  // namespace spmoe
