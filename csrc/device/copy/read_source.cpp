#include "device/copy/read_source.hpp"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <system_error>

namespace spmoe {

std::string read_source(const Extent& src, std::byte* dst) {
  if (src.data != nullptr) {
    std::memcpy(dst, src.data + src.offset, src.bytes);
    return {};
  }
  for (std::uint64_t done = 0; done < src.bytes;) {
    const auto offset = src.offset + done;
    const auto count = ::pread(src.file, dst + done, src.bytes - done, static_cast<off_t>(offset));
    if (count > 0) {
      done += static_cast<std::uint64_t>(count);
    } else if (count == 0) {
      return "the file ends at byte " + std::to_string(offset) + ", " +
             std::to_string(src.bytes - done) +
             " bytes short: it was truncated after it was opened";
    } else if (errno != EINTR) {
      return "read of " + std::to_string(src.bytes - done) + " bytes at offset " +
             std::to_string(offset) + " failed: " + std::generic_category().message(errno);
    }
  }
  return {};
}

}  // namespace spmoe
