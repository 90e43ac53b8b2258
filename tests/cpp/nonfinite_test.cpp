#include "runtime/nonfinite.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "base/convert.hpp"
#include "base/error.hpp"
#include "message_of.hpp"
#include "temp_file.hpp"

namespace spmoe {
namespace {

constexpr std::uint16_t layers = 3;
constexpr std::uint16_t experts = 4;
constexpr double ample_s = 60;

/// A store of one file, of experts in two extents of largest finite values.
class FiniteStore final : public ExpertStore {
 public:
  explicit FiniteStore(DType dtype, std::uint32_t inter = 5)
      : format_{.hidden = 7, .inter = inter, .dtype = dtype}, file_{{}} {
    const std::size_t elements = format_.bytes() / size_of(dtype);
    const float largest = dtype == DType::f16 ? 65504.0F : 3.3e38F;
    std::vector<std::byte> blob(format_.bytes());
    narrow(std::vector<float>(elements, -largest).data(), elements, dtype, blob.data());
    for (std::size_t i = 0; i < extents_.size(); ++i) {
      const std::size_t start = i * format_.bytes();
      file_.write(start, blob);
      extents_[i] = {Extent{nullptr, file_.descriptor(), start, format_.gate_up_bytes()},
                     Extent{nullptr, file_.descriptor(), start + format_.gate_up_bytes(),
                            format_.bytes() - format_.gate_up_bytes()}};
    }
  }

  /// Writes `value` over an element of an expert.
  void plant(ExpertId id, std::size_t element, float value) {
    std::array<std::byte, 4> bytes{};
    const std::size_t size = size_of(format_.dtype);
    narrow(&value, 1, format_.dtype, bytes.data());
    file_.write(place(id) * format_.bytes() + element * size, {bytes.data(), size});
  }
  void truncate(ExpertId id) { file_.truncate(place(id) * format_.bytes()); }

  [[nodiscard]] const BlobFormat& format() const noexcept override { return format_; }
  [[nodiscard]] std::uint16_t layer_count() const noexcept override { return layers; }
  [[nodiscard]] std::uint16_t expert_count() const noexcept override { return experts; }
  [[nodiscard]] std::span<const Extent> extents(ExpertId id) const override {
    return extents_.at(place(id));
  }
  [[nodiscard]] std::string describe(ExpertId) const override { return {}; }
  [[nodiscard]] std::vector<std::string> tensor_names() const override { return {}; }
  void check_unchanged() const override {}

 private:
  static std::size_t place(ExpertId id) { return std::size_t{id.layer} * experts + id.expert; }

  BlobFormat format_;
  TempFile file_;
  std::array<std::array<Extent, 2>, std::size_t{layers} * experts> extents_;
};

std::optional<ExpertId> find_in_all(const ExpertStore& store) {
  return find_nonfinite(store, 0, layers, ample_s);
}

TEST(FindNonfinite, finds_the_first_expert_with_one_wherever_it_is) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    SCOPED_TRACE(name_of(dtype));
    for (const float value : {std::nanf(""), infinity, -infinity}) {
      FiniteStore store{dtype};
      EXPECT_EQ(find_in_all(store), std::nullopt);
      const std::size_t last = store.format().bytes() / size_of(dtype) - 1;
      for (const std::size_t element : {last, std::size_t{0}, last / 2}) {
        store.plant({2, 1}, element, value);
        EXPECT_EQ(find_in_all(store), (ExpertId{2, 1})) << "element " << element;
        store.plant({2, 1}, element, 0.0F);
      }
      store.plant({2, 3}, 4, value);
      store.plant({1, 3}, 4, value);
      EXPECT_EQ(find_in_all(store), (ExpertId{1, 3}));
      EXPECT_EQ(find_nonfinite(store, 2, 3, ample_s), (ExpertId{2, 3}));
      EXPECT_EQ(find_nonfinite(store, 0, 1, ample_s), std::nullopt);
    }
  }
}

TEST(FindNonfinite, reads_blobs_of_many_chunks) {
  FiniteStore store{DType::f32, 1 << 17};  // 10.5 MiB
  const std::size_t last = store.format().bytes() / sizeof(float) - 1;
  store.plant({0, 2}, last, std::nanf(""));
  EXPECT_EQ(find_nonfinite(store, 0, 1, ample_s), (ExpertId{0, 2}));
}

TEST(FindNonfinite, stops_when_its_time_is_up) {
  FiniteStore store{DType::bf16};
  store.plant({0, 0}, 0, std::nanf(""));
  EXPECT_EQ(find_nonfinite(store, 0, layers, 0.0), std::nullopt);
}

TEST(FindNonfinite, passes_over_what_cannot_be_read) {
  FiniteStore store{DType::bf16};
  store.plant({0, 3}, 1, std::nanf(""));
  store.truncate({1, 0});
  EXPECT_EQ(find_nonfinite(store, 1, layers, ample_s), std::nullopt);
  EXPECT_EQ(find_in_all(store), (ExpertId{0, 3}));
}

TEST(FindNonfinite, refuses_a_layer_that_is_not_there) {
  const FiniteStore store{DType::bf16};
  EXPECT_EQ(
      message_of<InvalidArgument>([&] { static_cast<void>(find_nonfinite(store, 3, 4, ample_s)); }),
      "layers 3 to 4 asked, but the store has MoE layers 0 to 2");
}

}  // namespace
}  // namespace spmoe
