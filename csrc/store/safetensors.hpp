#pragma once

#include <compare>
#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

namespace spmoe {

/// Sole owner of an open file descriptor. Move-only; an empty handle is -1.
class FileHandle {
 public:
  FileHandle() = default;
  explicit FileHandle(int descriptor) noexcept : descriptor_{descriptor} {}
  FileHandle(FileHandle&& other) noexcept : descriptor_{std::exchange(other.descriptor_, -1)} {}
  FileHandle& operator=(FileHandle&& other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    return *this;
  }
  ~FileHandle();

  [[nodiscard]] int get() const noexcept { return descriptor_; }

 private:
  int descriptor_ = -1;
};

/// Size and time of the last write of a file, which change when it is written to but not when it
/// is renamed, linked or removed.
struct FileStamp {
  std::uint64_t bytes = 0;
  std::int64_t written_s = 0;  ///< since 1970
  std::int64_t written_ns = 0;
  auto operator<=>(const FileStamp&) const = default;
};

/// @throws CheckpointError, naming `file`, if it cannot be examined or is not a regular file.
[[nodiscard]] FileStamp stamp_of(const FileHandle& handle, const std::string& file);

/// One tensor as the header of its file describes it.
struct TensorInfo {
  std::string name;
  std::string dtype;                 ///< as written there: "BF16", "F8_E4M3", ...
  std::vector<std::uint64_t> shape;  ///< empty for a scalar
  std::uint64_t offset = 0;          ///< of its first byte, from the start of the file
  std::uint64_t bytes = 0;           ///< what `dtype` and `shape` say
};

/// An open safetensors file. Its tensors lie in the file without overlap or hole, in this order,
/// and their names differ.
struct SafetensorsFile {
  std::string name;  ///< without its directory
  FileHandle handle;
  FileStamp stamp;  ///< from before the header was read
  std::vector<TensorInfo> tensors;
};

/// Opens the file at `path` and reads its header, never its weights.
/// Every name in it is valid UTF-8 and at most 1000 bytes long, so fit for an error message.
/// @throws CheckpointError, naming the file, if it cannot be opened or does not hold exactly
///         what its header says.
[[nodiscard]] SafetensorsFile open_safetensors(const std::filesystem::path& path);

/// "[8, 14336, 4096]"; the middle of an absurdly long one is left out.
[[nodiscard]] std::string format_shape(const std::vector<std::uint64_t>& shape);

}  // namespace spmoe
