#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>

namespace spmoe {

/// One routed expert of the target model. Orders by layer, then by expert.
struct ExpertId {
  std::uint16_t layer;
  std::uint16_t expert;
  auto operator<=>(const ExpertId&) const = default;
};

/// Index of a slot: device memory that holds exactly one expert.
using SlotIndex = std::uint32_t;

/// Number of an event on a stream of a consumer of device memory (a cudaStream_t, e.g. torch's):
/// all work queued there before. 0 has passed, and so has every event of a device without streams.
using EventId = std::uint64_t;

/// A run of bytes at rest: in memory (`data` set) or in an open file (`data` null).
struct Extent {
  const std::byte* data = nullptr;
  int file = -1;             ///< open file descriptor, owned by the store
  std::uint64_t offset = 0;  ///< from the start of the file
  std::uint64_t bytes = 0;
};

}  // namespace spmoe
