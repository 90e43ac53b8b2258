#pragma once

#include <string>
#include <vector>

#include "store/safetensors.hpp"

namespace spmoe {

/// Reads the JSON of a safetensors header: a name in UTF-8 of at most 1000 bytes, dtype, shape
/// and place of each tensor, in the order of the text. Names differ. Offsets count from the
/// header's end, and neither they nor dtypes are checked against anything.
/// @throws CheckpointError saying what is wrong, but not in which file.
[[nodiscard]] std::vector<TensorInfo> parse_safetensors_header(const std::string& json);

}  // namespace spmoe
