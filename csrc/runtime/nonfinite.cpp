#include "runtime/nonfinite.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "base/trace.hpp"
#include "device/copy/read_source.hpp"

namespace spmoe {
namespace {

constexpr std::size_t chunk_bytes = std::size_t{1} << 20;  // whole elements of every dtype

/// Whether an element of `bytes` has all the bits of `exponent` set. Extents hold whole elements.
template <class Bits>
bool any_nonfinite(const std::byte* data, std::size_t bytes, Bits exponent) noexcept {
  bool found = false;
  for (std::size_t at = 0; at + sizeof(Bits) <= bytes; at += sizeof(Bits)) {
    Bits bits = 0;
    std::memcpy(&bits, data + at, sizeof(Bits));
    found |= (bits & exponent) == exponent;
  }
  return found;
}

bool any_nonfinite(const std::byte* data, std::size_t bytes, DType dtype) noexcept {
  switch (dtype) {
    case DType::f32: return any_nonfinite<std::uint32_t>(data, bytes, 0x7F800000U);
    case DType::f16: return any_nonfinite<std::uint16_t>(data, bytes, 0x7C00U);
    case DType::bf16: return any_nonfinite<std::uint16_t>(data, bytes, 0x7F80U);
  }
  return false;
}

/// Reads blobs chunk by chunk until a time.
class Scan {
 public:
  Scan(DType dtype, double end_s) : dtype_{dtype}, end_s_{end_s}, chunk_(chunk_bytes) {}

  [[nodiscard]] bool out_of_time() const { return now_s() >= end_s_; }

  [[nodiscard]] bool finds_one(std::span<const Extent> blob) {
    for (Extent rest : blob) {
      while (rest.bytes > 0 && !out_of_time()) {
        Extent part = rest;
        part.bytes = std::min<std::uint64_t>(rest.bytes, chunk_bytes);
        if (!read_source(part, chunk_.data()).empty()) return false;
        if (any_nonfinite(chunk_.data(), part.bytes, dtype_)) return true;
        rest.offset += part.bytes;
        rest.bytes -= part.bytes;
      }
    }
    return false;
  }

 private:
  const DType dtype_;
  const double end_s_;
  std::vector<std::byte> chunk_;
};

}  // namespace

std::optional<ExpertId> find_nonfinite(const ExpertStore& store, std::uint16_t first_layer,
                                       std::uint16_t last_layer, double budget_s) {
  if (first_layer >= last_layer || last_layer > store.layer_count()) {
    throw InvalidArgument{
        "layers " + std::to_string(first_layer) + " to " + std::to_string(last_layer) +
        " asked, but the store has MoE layers 0 to " + std::to_string(store.layer_count() - 1)};
  }
  Scan scan{store.format().dtype, now_s() + budget_s};
  for (std::uint16_t layer = first_layer; layer < last_layer; ++layer) {
    for (std::uint16_t expert = 0; expert < store.expert_count(); ++expert) {
      if (scan.out_of_time()) return std::nullopt;
      if (scan.finds_one(store.extents({layer, expert}))) return ExpertId{layer, expert};
    }
  }
  return std::nullopt;
}

}  // namespace spmoe
