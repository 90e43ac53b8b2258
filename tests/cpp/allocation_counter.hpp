#pragma once

#include <cstddef>

namespace spmoe {

/// Calls of `operator new` so far, by any thread of this test program.
[[nodiscard]] std::size_t allocation_count() noexcept;

}  // namespace spmoe
