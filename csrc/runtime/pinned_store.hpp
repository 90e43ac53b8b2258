#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "device/buffer.hpp"
#include "store/expert_store.hpp"

namespace spmoe {

/// Called with the bytes in place and the bytes in all. An exception from it ends the filling.
using FillProgress = std::function<void(std::uint64_t done_bytes, std::uint64_t total_bytes)>;

/// A store of which as many blobs as fit rest in pinned memory of a device, each contiguous, the
/// same share of every layer; the others stay where they are. Immutable, so thread-safe. Must be
/// destroyed before the device.
class PinnedStore final : public ExpertStore {
 public:
  /// Takes up to `budget_bytes` of pinned memory, in chunks, less if the device refuses: then what
  /// can be had but a spare. Reads blobs into it on `threads` threads. A file's pages do not stay
  /// in the system's cache.
  /// @throws DeviceError if a blob cannot be read, naming it.
  PinnedStore(std::shared_ptr<const ExpertStore> store, Device& device, std::uint64_t budget_bytes,
              unsigned threads, const FillProgress& progress = {});

  [[nodiscard]] const BlobFormat& format() const noexcept override { return store_->format(); }
  [[nodiscard]] std::uint16_t layer_count() const noexcept override {
    return store_->layer_count();
  }
  [[nodiscard]] std::uint16_t expert_count() const noexcept override {
    return store_->expert_count();
  }
  [[nodiscard]] std::span<const Extent> extents(ExpertId expert) const override;
  [[nodiscard]] std::string describe(ExpertId expert) const override {
    return store_->describe(expert);
  }
  [[nodiscard]] std::vector<std::string> tensor_names() const override {
    return store_->tensor_names();
  }
  void check_unchanged() const override { store_->check_unchanged(); }

  [[nodiscard]] std::uint64_t pinned_bytes() const noexcept;
  [[nodiscard]] double fill_s() const noexcept { return fill_s_; }  ///< reading took so long

 private:
  [[nodiscard]] ExpertId expert(std::size_t place) const;  // the order in which they are pinned
  void allocate(Device& device, std::uint64_t budget_bytes);
  void give_back(std::size_t blobs);
  void fill(unsigned threads, const FillProgress& progress);
  void read(std::size_t place) const;

  const std::shared_ptr<const ExpertStore> store_;
  const std::uint64_t stride_;
  std::vector<std::unique_ptr<PinnedBuffer>> chunks_;
  std::vector<Extent> pinned_;  // of the first experts, by place
  double fill_s_ = 0;
};

}  // namespace spmoe
