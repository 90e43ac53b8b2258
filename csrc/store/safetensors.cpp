#include "store/safetensors.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <optional>
#include <string_view>
#include <system_error>
#include <tuple>

#include "base/error.hpp"
#include "store/safetensors_header.hpp"

namespace spmoe {
namespace {

constexpr std::uint64_t length_bytes = 8;
constexpr std::uint64_t header_limit_bytes = 100'000'000;  // the reference reader's own limit
constexpr std::string_view git_lfs_pointer = "version ";   // the first 8 bytes of one

[[noreturn]] void refuse(const std::string& file, const std::string& problem) {
  throw CheckpointError{file + " " + problem + "; download the checkpoint again"};
}

[[noreturn]] void refuse_access(const std::string& file, const char* what, int error) {
  const char* cure = "; check the disk, or download the checkpoint again";
  if (error == EMFILE || error == ENFILE) cure = "; raise the limit of open files (ulimit -n)";
  if (error == EACCES || error == EPERM) cure = "; give this user permission to read it";
  throw CheckpointError{std::string{"cannot "} + what + " " + file + ": " +
                        std::generic_category().message(error) + cure};
}

FileHandle open_for_reading(const std::string& file) {
  int descriptor = -1;
  // Without O_NONBLOCK, opening a named pipe would wait for its writer. Files ignore it.
  do {
    descriptor = ::open(file.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  } while (descriptor < 0 && errno == EINTR);
  if (descriptor < 0) refuse_access(file, "open", errno);
  return FileHandle{descriptor};
}

std::string read(const FileHandle& handle, const std::string& file, std::uint64_t offset,
                 std::uint64_t bytes) {
  std::string text(bytes, '\0');
  for (std::uint64_t done = 0; done < bytes;) {
    const ssize_t got =
        ::pread(handle.get(), text.data() + done, bytes - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) refuse_access(file, "read", errno);
    if (got == 0) refuse(file, "became shorter while its header was read");
    done += static_cast<std::uint64_t>(got);
  }
  return text;
}

std::uint64_t read_header_length(const FileHandle& handle, const std::string& file,
                                 std::uint64_t file_bytes) {
  if (file_bytes < length_bytes) {
    refuse(file, "is truncated: it has " + std::to_string(file_bytes) +
                     " bytes, not even the 8 that give the length of its header");
  }
  const std::string digits = read(handle, file, 0, length_bytes);
  if (digits == git_lfs_pointer) {
    throw CheckpointError{file +
                          " holds a pointer of Git LFS in place of weights; run git lfs pull"};
  }
  std::uint64_t length = 0;
  for (std::size_t i = digits.size(); i-- > 0;) {
    length = length * 256 + static_cast<unsigned char>(digits[i]);
  }
  if (length > header_limit_bytes) {
    refuse(file, "is damaged or no safetensors file: it announces a header of " +
                     std::to_string(length) + " bytes, more than the limit of " +
                     std::to_string(header_limit_bytes));
  }
  if (length > file_bytes - length_bytes) {
    refuse(file, "is truncated: it announces a header of " + std::to_string(length) +
                     " bytes, but has only " + std::to_string(file_bytes - length_bytes) + " more");
  }
  return length;
}

std::optional<std::uint64_t> bits_of(std::string_view dtype) {
  using Width = std::pair<std::string_view, std::uint64_t>;
  static constexpr std::array<Width, 22> widths{
      {{"BOOL", 8},        {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8},
       {"I8", 8},          {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
       {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16},    {"F16", 16},    {"BF16", 16},
       {"I32", 32},        {"U32", 32},    {"F32", 32},    {"F64", 64},    {"I64", 64},
       {"U64", 64},        {"C64", 64}}};
  const auto* found = std::ranges::find(widths, dtype, &Width::first);
  return found == widths.end() ? std::nullopt : std::optional{found->second};
}

std::string quote(const TensorInfo& tensor) { return "tensor " + tensor.name; }

void check_size(const TensorInfo& tensor, const std::string& file) {
  const auto bits = bits_of(tensor.dtype);
  if (!bits) {
    throw CheckpointError{file + ": " + quote(tensor) + " has the unknown dtype \"" + tensor.dtype +
                          "\"; download the checkpoint again, or one of another dtype"};
  }
  std::uint64_t total_bits = *bits;
  bool overflow = false;
  for (const std::uint64_t extent : tensor.shape) {
    overflow = overflow || __builtin_mul_overflow(total_bits, extent, &total_bits);
  }
  if (overflow || total_bits % 8 != 0 || total_bits / 8 != tensor.bytes) {
    refuse(file, "is damaged: " + quote(tensor) + " is " + tensor.dtype + " " +
                     format_shape(tensor.shape) + ", but its data_offsets span " +
                     std::to_string(tensor.bytes) + " bytes");
  }
}

/// The tensors, sorted by offset, must tile the `data_bytes` behind the header.
void check_places(const std::vector<TensorInfo>& tensors, std::uint64_t data_bytes,
                  const std::string& file) {
  std::uint64_t end = 0;
  const TensorInfo* previous = nullptr;
  for (const TensorInfo& tensor : tensors) {
    const std::string before = previous == nullptr ? "the header" : quote(*previous);
    if (tensor.offset < end) {
      refuse(file, "is damaged: " + quote(tensor) + " overlaps " + before + " by " +
                       std::to_string(end - tensor.offset) + " bytes");
    }
    if (tensor.offset > end) {
      refuse(file, "is damaged: " + std::to_string(tensor.offset - end) + " bytes between " +
                       before + " and " + quote(tensor) + " belong to no tensor");
    }
    if (tensor.bytes > data_bytes - end) {
      refuse(file, "is truncated: " + quote(tensor) + " ends at byte " +
                       std::to_string(end + tensor.bytes) + " of the data, but there are only " +
                       std::to_string(data_bytes));
    }
    check_size(tensor, file);
    end += tensor.bytes;
    previous = &tensor;
  }
  if (end != data_bytes) {
    refuse(file, "is damaged: its last " + std::to_string(data_bytes - end) +
                     " bytes belong to no tensor");
  }
}

}  // namespace

FileHandle::~FileHandle() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

FileStamp stamp_of(const FileHandle& handle, const std::string& file) {
  struct stat status{};
  if (::fstat(handle.get(), &status) != 0) refuse_access(file, "examine", errno);
  if (!S_ISREG(status.st_mode)) {
    throw CheckpointError{file + " is not a file; pass the paths of the checkpoint's shards"};
  }
  return {static_cast<std::uint64_t>(status.st_size), status.st_mtim.tv_sec,
          status.st_mtim.tv_nsec};
}

std::string format_shape(const std::vector<std::uint64_t>& shape) {
  constexpr std::size_t shown = 6;
  std::string text;
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) text += ", ";
    if (shape.size() > shown && i == shown - 1) {
      text += "..., ";
      i = shape.size() - 1;
    }
    text += std::to_string(shape[i]);
  }
  return "[" + text + "]";
}

SafetensorsFile open_safetensors(const std::filesystem::path& path) {
  const std::string file = path.string();
  SafetensorsFile opened{path.filename().string(), open_for_reading(file), {}, {}};
  opened.stamp = stamp_of(opened.handle, file);
  const std::uint64_t file_bytes = opened.stamp.bytes;
  const std::uint64_t header_bytes = read_header_length(opened.handle, file, file_bytes);
  const std::string header = read(opened.handle, file, length_bytes, header_bytes);
  try {
    opened.tensors = parse_safetensors_header(header);
  } catch (const CheckpointError& error) {
    refuse(file, std::string{"is damaged: "} + error.what());
  }
  std::ranges::sort(opened.tensors, {}, [](const TensorInfo& tensor) {
    return std::tuple{tensor.offset, tensor.bytes};
  });
  const std::uint64_t data_start = length_bytes + header_bytes;
  check_places(opened.tensors, file_bytes - data_start, file);
  for (TensorInfo& tensor : opened.tensors) tensor.offset += data_start;
  return opened;
}

}  // namespace spmoe
