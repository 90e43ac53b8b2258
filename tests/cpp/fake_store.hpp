#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "random_expert.hpp"
#include "store/expert_store.hpp"
#include "temp_file.hpp"

namespace spmoe {

/// A store of random experts, each in three extents: gate, up, and what follows. They rest in
/// memory or, after `move_to_file`, in one file, apart and at odd offsets as in a shard.
class FakeStore final : public ExpertStore {
 public:
  FakeStore(const BlobFormat& format, std::uint16_t layer_count, std::uint16_t expert_count)
      : format_{format}, layer_count_{layer_count}, expert_count_{expert_count} {
    const std::size_t half = format.gate_up_bytes() / 2;
    for (std::uint32_t i = 0; i < std::uint32_t{layer_count} * expert_count; ++i) {
      const std::byte* blob = experts_.emplace_back(format, i + 1).blob();
      extents_.push_back({Extent{blob, -1, 0, half}, Extent{blob, -1, half, half},
                          Extent{blob, -1, 2 * half, format.bytes() - 2 * half}});
    }
  }

  [[nodiscard]] const BlobFormat& format() const noexcept override { return format_; }
  [[nodiscard]] std::uint16_t layer_count() const noexcept override { return layer_count_; }
  [[nodiscard]] std::uint16_t expert_count() const noexcept override { return expert_count_; }
  [[nodiscard]] std::span<const Extent> extents(ExpertId id) const override {
    return extents_.at(place(id));
  }
  [[nodiscard]] std::string describe(ExpertId id) const override {
    return "expert " + std::to_string(id.expert) + " of layer " + std::to_string(id.layer) +
           (file_ == nullptr ? " (memory)" : " (fake.safetensors)");
  }
  [[nodiscard]] std::vector<std::string> tensor_names() const override { return {}; }

  void check_unchanged() const override {
    if (changed) throw CheckpointChanged{"fake.safetensors was written to"};
  }
  bool changed = false;  ///< what `check_unchanged` reports

  [[nodiscard]] const RandomExpert& expert(ExpertId id) const { return experts_.at(place(id)); }

  /// Moves the experts to a file. Call it before the store is used.
  void move_to_file() {
    file_ = std::make_unique<TempFile>(std::span<const std::byte>{});
    std::uint64_t end = 0;
    for (auto& blob : extents_) {
      for (Extent& extent : blob) {
        end += 3;  // another tensor lies between
        file_->write(end, {extent.data + extent.offset, extent.bytes});
        extent = {nullptr, file_->descriptor(), end, extent.bytes};
        end += extent.bytes;
      }
    }
  }

  /// Cuts the file off in the last byte of `id`: it and all later experts are lost.
  void cut_file_after(ExpertId id) {
    const Extent& last = extents_.at(place(id)).back();
    file_->truncate(last.offset + last.bytes - 1);
  }
  /// Undoes `cut_file_after`.
  void mend_file() {
    for (std::size_t i = 0; i < experts_.size(); ++i) {
      const std::byte* blob = experts_[i].blob();
      for (const Extent& extent : extents_[i]) {
        file_->write(extent.offset, {blob, extent.bytes});
        blob += extent.bytes;
      }
    }
  }

 private:
  [[nodiscard]] std::size_t place(ExpertId id) const {
    return std::size_t{id.layer} * expert_count_ + id.expert;
  }

  BlobFormat format_;
  std::uint16_t layer_count_;
  std::uint16_t expert_count_;
  std::vector<RandomExpert> experts_;
  std::vector<std::array<Extent, 3>> extents_;
  std::unique_ptr<TempFile> file_;
};

}  // namespace spmoe
