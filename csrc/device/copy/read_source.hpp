#pragma once

#include <string>

#include "base/types.hpp"

namespace spmoe {

/// Copies the bytes of `src`, of memory or of a file, to `dst`. Blocks. Returns what went wrong,
/// empty if nothing.
[[nodiscard]] std::string read_source(const Extent& src, std::byte* dst);

}  // namespace spmoe
