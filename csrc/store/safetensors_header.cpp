#include "store/safetensors_header.hpp"

#include <array>
#include <nlohmann/json.hpp>
#include <string_view>
#include <unordered_set>

#include "base/error.hpp"

namespace spmoe {
namespace {

constexpr std::size_t text_limit_bytes = 1000;

/// Takes the events of the parser, so that nesting costs no stack and a repeated key, which a
/// document would swallow, is seen.
class HeaderReader final : public nlohmann::json_sax<nlohmann::json> {
 public:
  std::vector<TensorInfo> take() { return std::move(tensors_); }

  bool start_object(std::size_t /*elements*/) override {
    if (depth_ >= in_entry) refuse_value();
    ++depth_;
    return true;
  }

  bool key(string_t& name) override {
    if (name.size() > text_limit_bytes) {
      refuse("its header has a name of " + std::to_string(name.size()) + " bytes");
    }
    if (depth_ == in_header) {
      begin_entry(name);
    } else {
      begin_field(name);
    }
    return true;
  }

  bool end_object() override {
    --depth_;
    if (depth_ == in_header && !in_metadata_) finish_tensor();
    return true;
  }

  bool start_array(std::size_t /*elements*/) override {
    if (depth_ != in_entry || field_ == Field::dtype) refuse_value();
    ++depth_;
    return true;
  }

  bool end_array() override {
    --depth_;
    return true;
  }

  bool number_unsigned(number_unsigned_t value) override {
    if (depth_ == in_list && field_ == Field::shape) {
      tensor_.shape.push_back(value);
    } else if (depth_ == in_list && field_ == Field::data_offsets && offset_count_ < 2) {
      offsets_[offset_count_++] = value;
    } else {
      skip_value();
    }
    return true;
  }

  bool string(string_t& value) override {
    if (depth_ == in_entry && field_ == Field::dtype && value.size() <= text_limit_bytes) {
      tensor_.dtype = value;
    } else {
      skip_value();
    }
    return true;
  }

  bool null() override { return skip_value(); }
  bool boolean(bool) override { return skip_value(); }
  bool number_integer(number_integer_t) override { return skip_value(); }
  bool number_float(number_float_t, const string_t&) override { return skip_value(); }
  bool binary(binary_t&) override { return skip_value(); }

  // The parser's own message may quote bytes that are not UTF-8.
  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::json::exception&) override {
    refuse("its header is not JSON in UTF-8 (byte " + std::to_string(position) + ")");
  }

 private:
  enum class Field : std::uint8_t { other, dtype, shape, data_offsets };
  enum Depth : std::uint8_t { outside, in_header, in_entry, in_list };

  [[noreturn]] static void refuse(const std::string& problem) { throw CheckpointError{problem}; }

  [[noreturn]] void refuse_value() const {
    if (depth_ < in_entry) refuse("its header is not a JSON object of objects");
    refuse("its header has an unexpected value in \"" + tensor_.name +
           "\", which should have a dtype, a shape and two data_offsets");
  }

  bool skip_value() const {
    if (depth_ < in_entry || field_ != Field::other) refuse_value();
    return true;
  }

  void begin_entry(const std::string& name) {
    if (!names_.insert(name).second) refuse("its header names the tensor " + name + " twice");
    in_metadata_ = name == "__metadata__";
    tensor_ = {};
    tensor_.name = name;
    field_ = Field::other;
    seen_ = {};
    offset_count_ = 0;
  }

  void begin_field(const std::string& name) {
    static constexpr std::array<std::string_view, 4> fields{"", "dtype", "shape", "data_offsets"};
    field_ = Field::other;
    if (in_metadata_) return;
    for (std::size_t i = 1; i < fields.size(); ++i) {
      if (name != fields[i]) continue;
      if (seen_[i]) refuse("tensor " + tensor_.name + " has " + name + " twice in the header");
      seen_[i] = true;
      field_ = static_cast<Field>(i);
    }
  }

  void finish_tensor() {
    if (!seen_[1] || !seen_[2] || !seen_[3] || offset_count_ != 2) {
      refuse("its header lacks the dtype, the shape or one of two data_offsets of tensor " +
             tensor_.name);
    }
    if (offsets_[1] < offsets_[0]) {
      refuse("tensor " + tensor_.name + " has data_offsets that run backwards, from " +
             std::to_string(offsets_[0]) + " to " + std::to_string(offsets_[1]));
    }
    tensor_.offset = offsets_[0];
    tensor_.bytes = offsets_[1] - offsets_[0];
    tensors_.push_back(std::move(tensor_));
  }

  std::vector<TensorInfo> tensors_;
  std::unordered_set<std::string> names_;
  TensorInfo tensor_;
  std::array<std::uint64_t, 2> offsets_{};
  std::size_t offset_count_ = 0;
  std::array<bool, 4> seen_{};
  Field field_ = Field::other;
  std::uint8_t depth_ = outside;
  bool in_metadata_ = false;
};

}  // namespace

std::vector<TensorInfo> parse_safetensors_header(const std::string& json) {
  // The parser takes a zero byte for the end of the text.
  if (const auto zero = json.find('\0'); zero != std::string::npos) {
    throw CheckpointError{"its header is not JSON in UTF-8 (byte " + std::to_string(zero + 1) +
                          ")"};
  }
  HeaderReader reader;
  nlohmann::json::sax_parse(json, &reader);
  return reader.take();
}

}  // namespace spmoe
