// The store over any bytes at all: a file is refused with an error of ours, or everything that the
// store says of it lies within the file. An entry point of libFuzzer; fuzz_loop.cpp calls it too.

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

#include "base/error.hpp"
#include "store/expert_store.hpp"
#include "store/safetensors.hpp"

namespace {

/// Ends the process, as a sanitizer does.
void require(bool holds, const char* what) {
  if (holds) return;
  static_cast<void>(std::fprintf(stderr, "fuzz_store: %s\n", what));
  std::abort();
}

/// A file in memory that holds `size` bytes of `data`.
spmoe::FileHandle memory_file(const std::uint8_t* data, std::size_t size) {
  spmoe::FileHandle file{::memfd_create("fuzzed.safetensors", MFD_CLOEXEC)};
  require(file.get() >= 0, "memfd_create failed");
  for (std::size_t done = 0; done < size;) {
    const ssize_t wrote = ::write(file.get(), data + done, size - done);
    require(wrote > 0, "cannot write the file");
    done += static_cast<std::size_t>(wrote);
  }
  return file;
}

void check_tensors(const spmoe::SafetensorsFile& file, std::uint64_t size) {
  std::uint64_t end = 0;
  for (const spmoe::TensorInfo& tensor : file.tensors) {
    require(tensor.offset >= end, "tensors overlap");
    require(tensor.bytes <= size && tensor.offset <= size - tensor.bytes, "tensor past the end");
    require(tensor.name.size() <= 1000, "a name is too long");
    end = tensor.offset + tensor.bytes;
  }
}

void check_store(const spmoe::ExpertStore& store, std::uint64_t size) {
  for (std::uint16_t layer = 0; layer < store.layer_count(); ++layer) {
    for (std::uint16_t expert = 0; expert < store.expert_count(); ++expert) {
      std::uint64_t bytes = 0;
      for (const spmoe::Extent& extent : store.extents({layer, expert})) {
        require(extent.bytes <= size && extent.offset <= size - extent.bytes,
                "extent past the end");
        bytes += extent.bytes;
      }
      require(bytes == store.format().bytes(), "the extents are not a blob");
      require(!store.describe({layer, expert}).empty(), "an expert without a description");
    }
  }
  require(!store.tensor_names().empty(), "a store without tensors");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const spmoe::FileHandle file = memory_file(data, size);
  const std::string path = "/proc/self/fd/" + std::to_string(file.get());
  try {
    check_tensors(spmoe::open_safetensors(path), size);
  } catch (const spmoe::CheckpointError&) {
    return 0;
  }
  for (const bool interleaved : {false, true}) {
    try {
      check_store(*spmoe::ExpertStore::open({path}, {.layers = {}, .interleaved = interleaved}),
                  size);
    } catch (const spmoe::CheckpointError&) {  // experts that differ, or lack a tensor
    } catch (const spmoe::InvalidArgument&) {  // no tensor is an expert's
    }
  }
  return 0;
}
