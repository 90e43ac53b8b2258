#pragma once

#include <array>
#include <cstdint>
#include <cstdio>
#include <string>

namespace spmoe {

/// "5.1 MiB": a size for people, in binary units.
inline std::string format_bytes(std::uint64_t bytes) {
  static constexpr std::array units{"bytes", "KiB", "MiB", "GiB", "TiB"};
  auto value = static_cast<double>(bytes);
  std::size_t unit = 0;
  // From 1023.95 on, "%.1f" would print 1024.0.
  for (; value >= (unit == 0 ? 1024 : 1023.95) && unit + 1 < units.size(); ++unit) value /= 1024;
  std::array<char, 32> text{};
  static_cast<void>(std::snprintf(text.data(), text.size(), unit == 0 ? "%.0f %s" : "%.1f %s",
                                  value, units[unit]));
  return text.data();
}

}  // namespace spmoe
