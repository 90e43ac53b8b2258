#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <span>

namespace spmoe {

/// A file without a name that is gone with its owner.
class TempFile {
 public:
  explicit TempFile(std::span<const std::byte> content) : file_{std::tmpfile()} {
    EXPECT_NE(file_, nullptr);
    write(0, content);
  }
  TempFile(const TempFile&) = delete;
  TempFile& operator=(const TempFile&) = delete;
  ~TempFile() { static_cast<void>(std::fclose(file_)); }

  [[nodiscard]] int descriptor() const { return ::fileno(file_); }

  void write(std::uint64_t offset, std::span<const std::byte> content) const {
    EXPECT_EQ(::pwrite(descriptor(), content.data(), content.size(), static_cast<off_t>(offset)),
              static_cast<ssize_t>(content.size()));
  }
  void truncate(std::uint64_t bytes) const {
    EXPECT_EQ(::ftruncate(descriptor(), static_cast<off_t>(bytes)), 0);
  }

 private:
  std::FILE* file_;
};

}  // namespace spmoe
