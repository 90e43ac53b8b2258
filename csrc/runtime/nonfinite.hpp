#pragma once

#include <cstdint>
#include <optional>

#include "base/types.hpp"
#include "store/expert_store.hpp"

namespace spmoe {

/// The first expert of the layers [first_layer, last_layer) of `store`, by layer, then by expert,
/// with a weight that is infinite or not a number, as a damaged disk leaves them. Reads blobs for
/// at most about `budget_s` seconds and returns nothing once they have passed. Blobs that cannot be
/// read are skipped. Blocks; may be called from any thread.
/// @throws InvalidArgument if the store has no such layers.
[[nodiscard]] std::optional<ExpertId> find_nonfinite(const ExpertStore& store,
                                                     std::uint16_t first_layer,
                                                     std::uint16_t last_layer, double budget_s);

}  // namespace spmoe
