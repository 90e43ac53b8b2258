#include "store/expert_layout.hpp"

#include <algorithm>
#include <charconv>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "base/error.hpp"

namespace spmoe {
namespace {

using enum Part;

constexpr std::array<Naming::Name, 6> projection_names{{{"gate_proj.weight", gate, false},
                                                        {"up_proj.weight", up, false},
                                                        {"down_proj.weight", down, false},
                                                        {"gate_proj.bias", gate_bias, true},
                                                        {"up_proj.bias", up_bias, true},
                                                        {"down_proj.bias", down_bias, true}}};
constexpr std::array<Naming::Name, 6> numbered_names{{{"w1.weight", gate, false},
                                                      {"w3.weight", up, false},
                                                      {"w2.weight", down, false},
                                                      {"w1.bias", gate_bias, true},
                                                      {"w3.bias", up_bias, true},
                                                      {"w2.bias", down_bias, true}}};
constexpr std::array<Naming::Name, 4> fused_names{{{"gate_up_proj", gate_up, false},
                                                   {"down_proj", down, false},
                                                   {"gate_up_proj_bias", gate_up_bias, true},
                                                   {"down_proj_bias", down_bias, true}}};
constexpr std::array<Naming::Name, 2> fully_connected_names{
    {{"fc1.weight", gate_up, false}, {"fc2.weight", down, false}}};
constexpr std::array<Naming::Name, 2> parallel_names{
    {{"input_linear.weight", gate_up, false}, {"output_linear.weight", down, false}}};
constexpr std::array<Naming, 5> namings{{{"experts", projection_names, false},
                                         {"experts", numbered_names, false},
                                         {"experts", fused_names, true},
                                         {"experts", fully_connected_names, true},
                                         {"block_sparse_moe", parallel_names, true}}};

/// Cuts the part before the first dot off `rest`.
std::string_view take_word(std::string_view& rest) {
  const std::size_t dot = rest.find('.');
  const std::string_view word = rest.substr(0, dot);
  rest.remove_prefix(dot == std::string_view::npos ? rest.size() : dot + 1);
  return word;
}

std::optional<std::uint32_t> parse_number(std::string_view text) {
  std::uint32_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
  return number;
}

DType parse_dtype(const TensorInfo& tensor) {
  if (tensor.dtype == "F32") return DType::f32;
  if (tensor.dtype == "F16") return DType::f16;
  if (tensor.dtype == "BF16") return DType::bf16;
  throw CheckpointError{"the expert tensor " + tensor.name + " is of dtype " + tensor.dtype +
                        ", but spmoe reads F32, F16 and BF16; use a checkpoint that is not "
                        "quantized, or convert this one"};
}

std::string format_tensor(const TensorInfo& tensor) {
  return tensor.name + " " + format_shape(tensor.shape);
}

std::vector<std::uint64_t> expected_shape(Part part, const BlobFormat& format) {
  const std::uint64_t hidden = format.hidden;
  const std::uint64_t inter = format.inter;
  const auto matrix = [&](std::uint64_t rows, std::uint64_t columns) {
    return format.transposed ? std::vector{columns, rows} : std::vector{rows, columns};
  };
  switch (part) {
    case gate:
    case up: return matrix(inter, hidden);
    case gate_up: return matrix(2 * inter, hidden);
    case down: return matrix(hidden, inter);
    case gate_bias:
    case up_bias: return {inter};
    case gate_up_bias: return {2 * inter};
    case down_bias: return {hidden};
  }
  return {};
}

[[noreturn]] void refuse_pair(const TensorInfo& first, const TensorInfo& second, const char* rule) {
  throw CheckpointError{format_tensor(first) + " and " + format_tensor(second) +
                        " do not fit together: spmoe reads " + rule +
                        "; download the checkpoint again, or use transformers for this model"};
}

}  // namespace

std::optional<ExpertTensorName> parse_expert_tensor_name(std::string_view name) {
  std::optional<std::uint32_t> layer;
  std::string_view stack;
  std::string_view rest = name;
  const auto position = [&] { return static_cast<std::size_t>(rest.data() - name.data()); };
  for (std::size_t start = 0; !rest.empty(); start = position()) {
    const std::string_view word = take_word(rest);
    if (word == "layers") {
      std::string_view after = rest;
      layer = parse_number(take_word(after));
      stack = name.substr(0, start);
    }
    if (!layer) continue;
    ExpertTensorName parsed{stack, *layer, name.substr(0, position()), 0, nullptr, gate};
    std::string_view suffix = rest;
    const auto expert = parse_number(take_word(suffix));
    if (!expert) suffix = rest;
    for (const Naming& naming : namings) {
      const auto found = std::ranges::find(naming.names, suffix, &Naming::Name::suffix);
      if (word != naming.parent || naming.fused == expert.has_value() ||
          found == naming.names.end()) {
        continue;
      }
      parsed.naming = &naming;
      parsed.part = found->part;
      parsed.expert = expert.value_or(0);
    }
    if (parsed.naming != nullptr || word == "experts") return parsed;
  }
  return std::nullopt;
}

BlobFormat deduce_format(const ExpertTensors& tensors, const Naming& naming, bool interleaved) {
  const TensorInfo& first = *tensors[naming.fused ? gate_up : gate].tensor;
  const TensorInfo& second = *tensors[down].tensor;
  // First: a quantized tensor is packed, so its shape would be blamed for its dtype.
  const DType dtype = parse_dtype(first);
  const auto& a = first.shape;
  const auto& b = second.shape;
  const std::size_t rank = naming.fused ? 3 : 2;
  const char* rule = naming.fused ? "gate_up [E, 2I, H] with down [E, H, I], or gate_up [E, H, 2I] "
                                    "with down [E, I, H]"
                                  : "gate [I, H] with down [H, I]";
  if (a.size() != rank || b.size() != rank || std::ranges::count(a, 0U) > 0 ||
      std::ranges::count(b, 0U) > 0) {
    refuse_pair(first, second, rule);
  }
  std::uint64_t hidden = b[rank - 2];
  std::uint64_t inter = b[rank - 1];
  const std::uint64_t gates = naming.fused ? 2 : 1;
  const bool transposed = naming.fused && a[1] == b[2] && a[2] == 2 * b[1];
  if (transposed) std::swap(hidden, inter);
  if (!transposed && (a[rank - 1] != hidden || a[rank - 2] != gates * inter)) {
    refuse_pair(first, second, rule);
  }
  constexpr std::uint64_t limit = std::numeric_limits<std::uint32_t>::max();
  if (hidden > limit || inter > limit) refuse_pair(first, second, "sizes below 2^32");
  return {
      static_cast<std::uint32_t>(hidden), static_cast<std::uint32_t>(inter),   dtype, transposed,
      interleaved && naming.fused,        tensors[down_bias].tensor != nullptr};
}

void check_format(const ExpertTensors& tensors, const Naming& naming, const BlobFormat& format,
                  std::uint64_t expert_count, const TensorInfo& reference) {
  for (const Naming::Name& name : naming.names) {
    const TensorInfo* tensor = tensors[name.part].tensor;
    if (tensor == nullptr) continue;
    if (parse_dtype(*tensor) != format.dtype) {
      throw CheckpointError{tensor->name + " is of dtype " + tensor->dtype + ", but " +
                            reference.name + " of " + reference.dtype +
                            ": spmoe needs one dtype for all experts; convert the checkpoint"};
    }
    std::vector<std::uint64_t> shape = expected_shape(name.part, format);
    if (naming.fused) shape.insert(shape.begin(), expert_count);
    if (tensor->shape != shape) {
      throw CheckpointError{format_tensor(*tensor) + " does not fit " + format_tensor(reference) +
                            ": spmoe expects it to be " + format_shape(shape) +
                            "; download the checkpoint again"};
    }
  }
}

}  // namespace spmoe
