#include "store/expert_store.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "base/error.hpp"
#include "checkpoint_files.hpp"
#include "message_of.hpp"

namespace spmoe {
namespace {

constexpr std::uint64_t hidden = 6;
constexpr std::uint64_t inter = 4;
using Names = std::array<const char*, 3>;  // gate, up, down
constexpr Names projections{"gate_proj", "up_proj", "down_proj"};
constexpr Names numbered{"w1", "w3", "w2"};

/// The tensors of a checkpoint with random bytes, and the blobs that must come out of it.
class Checkpoint {
 public:
  explicit Checkpoint(std::string dtype = "BF16") : dtype_{std::move(dtype)} {}

  TestTensor& add(const std::string& name, const std::vector<std::uint64_t>& shape) {
    const std::uint64_t element = dtype_ == "F32" ? 4 : 2;
    std::string bytes(std::accumulate(shape.begin(), shape.end(), element, std::multiplies{}), ' ');
    std::ranges::generate(bytes, [&] { return static_cast<char>(random_() & 0x7F); });
    tensors.push_back({name, dtype_, shape, bytes});
    return tensors.back();
  }

  /// One expert of three tensors, whose names start with `prefix`, and its three biases.
  void add_expert(ExpertId id, const std::string& prefix, const Names& names,
                  bool with_bias = false) {
    const std::vector<std::uint64_t> up_shape{inter, hidden};
    std::string& blob = blobs[id];
    blob += add(prefix + names[0] + ".weight", up_shape).bytes;
    blob += add(prefix + names[1] + ".weight", up_shape).bytes;
    blob += add(prefix + names[2] + ".weight", {hidden, inter}).bytes;
    if (!with_bias) return;
    blob += add(prefix + names[0] + ".bias", {inter}).bytes;
    blob += add(prefix + names[1] + ".bias", {inter}).bytes;
    blob += add(prefix + names[2] + ".bias", {hidden}).bytes;
  }

  /// A part of all experts of a layer in one tensor.
  void add_fused(std::uint16_t layer, const std::string& name,
                 const std::vector<std::uint64_t>& shape) {
    const std::string bytes = add(name, shape).bytes;
    const std::uint64_t share = bytes.size() / shape[0];
    for (std::uint64_t expert = 0; expert < shape[0]; ++expert) {
      blobs[{layer, static_cast<std::uint16_t>(expert)}] += bytes.substr(expert * share, share);
    }
  }

  TestTensor& find(const std::string& name) {
    return *std::ranges::find(tensors, name, &TestTensor::name);
  }
  void remove(const std::string& name) {
    std::erase_if(tensors, [&](const TestTensor& tensor) { return tensor.name == name; });
  }
  void shuffle() { std::ranges::shuffle(tensors, random_); }

  std::vector<TestTensor> tensors;
  std::map<ExpertId, std::string> blobs;

 private:
  std::string dtype_;
  std::mt19937 random_{7};
};

std::string expert_prefix(int layer, int expert) {
  return "model.layers." + std::to_string(layer) + ".mlp.experts." + std::to_string(expert) + ".";
}

/// Two layers of three experts.
Checkpoint small_checkpoint(const std::string& dtype = "BF16") {
  Checkpoint checkpoint{dtype};
  for (std::uint16_t layer = 0; layer < 2; ++layer) {
    for (std::uint16_t expert = 0; expert < 3; ++expert) {
      checkpoint.add_expert({layer, expert}, expert_prefix(layer, expert), projections);
    }
  }
  return checkpoint;
}

class ExpertStoreTest : public ::testing::Test {
 protected:
  /// Deals the tensors to `file_count` shards in turn.
  std::vector<std::filesystem::path> write(const Checkpoint& checkpoint,
                                           std::size_t file_count = 1) const {
    std::vector<std::filesystem::path> files;
    for (std::size_t i = 0; i < file_count; ++i) {
      std::vector<TestTensor> shard;
      for (std::size_t j = i; j < checkpoint.tensors.size(); j += file_count) {
        shard.push_back(checkpoint.tensors[j]);
      }
      files.push_back(directory.write("shard-" + std::to_string(i), safetensors(shard)));
    }
    return files;
  }

  std::shared_ptr<const ExpertStore> open(const Checkpoint& checkpoint,
                                          const ExpertStoreOptions& options = {}) const {
    return ExpertStore::open(write(checkpoint), options);
  }

  template <class Expected = CheckpointError>
  std::string refusal(const Checkpoint& checkpoint, const ExpertStoreOptions& options = {}) const {
    const std::string message = message_of<Expected>([&] { return open(checkpoint, options); });
    EXPECT_LT(message.size(), 600U);
    return message;
  }

  TemporaryDirectory directory;
};

std::string read_blob(const ExpertStore& store, ExpertId expert) {
  std::string blob;
  for (const Extent& extent : store.extents(expert)) {
    EXPECT_EQ(extent.data, nullptr);
    std::string bytes(extent.bytes, ' ');
    EXPECT_EQ(::pread(extent.file, bytes.data(), bytes.size(), static_cast<off_t>(extent.offset)),
              static_cast<ssize_t>(bytes.size()));
    blob += bytes;
  }
  return blob;
}

void expect_blobs(const ExpertStore& store, const Checkpoint& checkpoint) {
  EXPECT_EQ(std::size_t{store.layer_count()} * store.expert_count(), checkpoint.blobs.size());
  for (const auto& [expert, blob] : checkpoint.blobs) {
    EXPECT_EQ(blob.size(), store.format().bytes());
    EXPECT_EQ(read_blob(store, expert), blob) << store.describe(expert);
  }
}

TEST_F(ExpertStoreTest, experts_of_three_tensors_are_joined_in_blob_order) {
  for (const Names& names : {projections, numbered}) {
    for (const std::string parent : {"mlp", "block_sparse_moe"}) {
      Checkpoint checkpoint;
      for (std::uint16_t expert = 0; expert < 12; ++expert) {
        checkpoint.add_expert(
            {0, expert}, "model.layers.0." + parent + ".experts." + std::to_string(expert) + ".",
            names);
      }
      checkpoint.shuffle();
      const auto store = open(checkpoint, {.layers = {}, .interleaved = true});
      EXPECT_EQ(store->format(),
                (BlobFormat{hidden, inter, DType::bf16, false, /*interleaved=*/false, false}));
      expect_blobs(*store, checkpoint);
    }
  }
}

TEST_F(ExpertStoreTest, biases_of_separate_tensors_are_joined_behind_the_weights) {
  Checkpoint checkpoint;
  checkpoint.add_expert({0, 0}, expert_prefix(0, 0), projections, /*with_bias=*/true);
  checkpoint.add_expert({0, 1}, expert_prefix(0, 1), projections, /*with_bias=*/true);
  const auto store = open(checkpoint);
  EXPECT_TRUE(store->format().has_bias);
  expect_blobs(*store, checkpoint);
}

TEST_F(ExpertStoreTest, the_checkpoints_dtype_is_kept) {
  const std::vector<std::pair<std::string, DType>> dtypes{
      {"F32", DType::f32}, {"F16", DType::f16}, {"BF16", DType::bf16}};
  for (const auto& [name, dtype] : dtypes) {
    const Checkpoint checkpoint = small_checkpoint(name);
    const auto store = open(checkpoint);
    EXPECT_EQ(store->format().dtype, dtype);
    expect_blobs(*store, checkpoint);
  }
}

TEST_F(ExpertStoreTest, fused_tensors_are_cut_into_experts) {
  Checkpoint checkpoint;
  for (std::uint16_t layer = 0; layer < 2; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".mlp.experts.";
    checkpoint.add_fused(layer, prefix + "gate_up_proj", {3, 2 * inter, hidden});
    checkpoint.add_fused(layer, prefix + "down_proj", {3, hidden, inter});
  }
  const auto store = open(checkpoint);
  EXPECT_EQ(store->format(), (BlobFormat{hidden, inter, DType::bf16, false, false, false}));
  expect_blobs(*store, checkpoint);
}

TEST_F(ExpertStoreTest, fused_tensors_go_by_the_names_of_their_families) {
  using FusedNames = std::array<std::string, 2>;
  for (const FusedNames& names :
       {FusedNames{"block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"},
        FusedNames{"mlp.experts.fc1.weight", "mlp.experts.fc2.weight"}}) {
    Checkpoint checkpoint;
    for (std::uint16_t layer = 0; layer < 2; ++layer) {
      const std::string prefix = "model.layers." + std::to_string(layer) + ".";
      checkpoint.add_fused(layer, prefix + names[0], {3, 2 * inter, hidden});
      checkpoint.add_fused(layer, prefix + names[1], {3, hidden, inter});
      checkpoint.add(prefix + "shared_mlp.input_linear.weight", {2 * inter, hidden});
      checkpoint.add(prefix + "block_sparse_moe.router.layer.weight", {3, hidden});
    }
    const auto store = open(checkpoint);
    expect_blobs(*store, checkpoint);
    EXPECT_EQ(store->tensor_names().size(), 4U);
    checkpoint.remove("model.layers.1." + names[1]);
    EXPECT_TRUE(contains(refusal(checkpoint), "model.layers.1." + names[1] + " is missing"));
  }
}

TEST_F(ExpertStoreTest, tensors_may_be_called_by_names_that_are_given) {
  Checkpoint checkpoint;
  ExpertStoreOptions options;
  for (std::uint16_t expert = 0; expert < 3; ++expert) {
    const std::string prefix = "h.0.ffn." + std::to_string(expert) + ".";
    checkpoint.add_expert({0, expert}, prefix, {"v", "u", "o"});
    const std::string known = "layers.0.experts." + std::to_string(expert) + ".";
    options.names[prefix + "v.weight"] = known + "gate_proj.weight";
    options.names[prefix + "u.weight"] = known + "up_proj.weight";
    options.names[prefix + "o.weight"] = known + "down_proj.weight";
  }
  const std::vector<TestTensor> given = checkpoint.tensors;
  checkpoint.add("layers.0.experts.0.gate_proj.weight", {1});  // not one of the names given
  const auto store = open(checkpoint, options);
  expect_blobs(*store, checkpoint);
  EXPECT_EQ(store->tensor_names().size(), given.size());
  EXPECT_EQ(store->tensor_names().front(), "h.0.ffn.0.o.weight");
  checkpoint.remove("h.0.ffn.1.u.weight");
  EXPECT_TRUE(contains(refusal(checkpoint, options), "layers.0.experts.1.up_proj.weight"));
}

TEST_F(ExpertStoreTest, transposed_tensors_with_biases_are_cut_into_experts) {
  Checkpoint checkpoint;
  const std::string prefix = "model.layers.0.mlp.experts.";
  checkpoint.add_fused(0, prefix + "gate_up_proj", {3, hidden, 2 * inter});
  checkpoint.add_fused(0, prefix + "down_proj", {3, inter, hidden});
  checkpoint.add_fused(0, prefix + "gate_up_proj_bias", {3, 2 * inter});
  checkpoint.add_fused(0, prefix + "down_proj_bias", {3, hidden});
  checkpoint.shuffle();
  const auto store = open(checkpoint, {.layers = {}, .interleaved = true});
  EXPECT_EQ(store->format(), (BlobFormat{hidden, inter, DType::bf16, true, true, true}));
  expect_blobs(*store, checkpoint);
}

TEST_F(ExpertStoreTest, shapes_alone_distinguish_plain_from_transposed) {
  for (std::uint32_t h = 1; h <= 6; ++h) {
    for (std::uint32_t i = 1; i <= 6; ++i) {
      for (const bool transposed : {false, true}) {
        Checkpoint checkpoint;
        using Shape = std::vector<std::uint64_t>;
        checkpoint.add("layers.0.experts.gate_up_proj",
                       transposed ? Shape{2, h, 2 * i} : Shape{2, 2 * i, h});
        checkpoint.add("layers.0.experts.down_proj", transposed ? Shape{2, i, h} : Shape{2, h, i});
        EXPECT_EQ(open(checkpoint)->format(),
                  (BlobFormat{h, i, DType::bf16, transposed, false, false}));
      }
    }
  }
}

TEST_F(ExpertStoreTest, the_tensors_of_an_expert_may_be_in_different_shards) {
  Checkpoint checkpoint = small_checkpoint();
  checkpoint.shuffle();
  const auto store = ExpertStore::open(write(checkpoint, 4));
  expect_blobs(*store, checkpoint);
}

TEST_F(ExpertStoreTest, neighbours_in_a_file_are_one_extent) {
  const Checkpoint checkpoint = small_checkpoint();
  const auto together = open(checkpoint);
  EXPECT_EQ(together->extents({1, 2}).size(), 1U);
  Checkpoint apart = small_checkpoint();
  std::swap(apart.tensors[1], apart.tensors[2]);  // gate, down, up
  EXPECT_EQ(open(apart)->extents({0, 0}).size(), 3U);
  EXPECT_EQ(open(apart)->extents({0, 1}).size(), 1U);
}

TEST_F(ExpertStoreTest, tensors_that_are_not_routed_experts_are_left_alone) {
  Checkpoint checkpoint = small_checkpoint();
  for (const std::string name :
       {"model.layers.0.mlp.shared_experts.gate_proj.weight",
        "model.layers.0.mlp.shared_expert.gate_proj.weight",
        "model.layers.0.mlp.shared_experts.0.gate_proj.weight",
        "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.gate.weight",
        "model.layers.x.mlp.experts.0.gate_proj.weight", "experts.0.gate_proj.weight",
        "model.embed_tokens.weight", "model.layers.0.mlp.experts.0.gate_proj.weight_scale", ""}) {
    checkpoint.add(name, {5, 7});
  }
  const auto store = open(checkpoint);
  expect_blobs(*store, checkpoint);
  EXPECT_EQ(store->tensor_names().size(), 18U);
}

TEST_F(ExpertStoreTest, tensor_names_are_sorted_and_exactly_those_of_the_blobs) {
  Checkpoint checkpoint = small_checkpoint();
  std::set<std::string> names;
  for (const TestTensor& tensor : checkpoint.tensors) names.insert(tensor.name);
  checkpoint.shuffle();
  EXPECT_EQ(open(checkpoint)->tensor_names(),
            (std::vector<std::string>{names.begin(), names.end()}));
  EXPECT_EQ(open(checkpoint, {.layers = {1}})->tensor_names().size(), 9U);
}

TEST_F(ExpertStoreTest, layers_without_experts_are_skipped_and_the_rest_ascend) {
  Checkpoint checkpoint;
  checkpoint.add_expert({1, 0}, expert_prefix(10, 0), projections);
  checkpoint.add_expert({0, 0}, expert_prefix(9, 0), projections);
  const auto store = open(checkpoint);
  expect_blobs(*store, checkpoint);
  EXPECT_EQ(store->describe({1, 0}), "expert 0 of layer 1 (layers.10 in shard-0)");
}

TEST_F(ExpertStoreTest, wanted_layers_come_in_the_order_asked) {
  const Checkpoint checkpoint = small_checkpoint();
  const auto store = open(checkpoint, {.layers = {1, 0}});
  EXPECT_EQ(read_blob(*store, {0, 2}), checkpoint.blobs.at({1, 2}));
  EXPECT_EQ(read_blob(*store, {1, 0}), checkpoint.blobs.at({0, 0}));
}

TEST_F(ExpertStoreTest, a_layer_that_is_not_wanted_may_be_of_another_kind) {
  Checkpoint checkpoint = small_checkpoint();
  checkpoint.add("model.layers.2.mlp.experts.0.gate_proj.weight", {1});
  EXPECT_EQ(open(checkpoint, {.layers = {0, 1}})->layer_count(), 2U);
}

TEST_F(ExpertStoreTest, an_added_heads_experts_are_not_the_models) {
  Checkpoint checkpoint = small_checkpoint();
  const std::size_t of_model = checkpoint.tensors.size();
  checkpoint.add("mtp.layers.0.mlp.experts.0.gate_proj.weight", {inter, hidden});
  const auto store = open(checkpoint);
  expect_blobs(*store, checkpoint);
  EXPECT_EQ(store->tensor_names().size(), of_model);
}

TEST_F(ExpertStoreTest, two_models_of_equal_depth_are_refused) {
  Checkpoint checkpoint;
  checkpoint.add("a.layers.0.mlp.experts.0.gate_proj.weight", {inter, hidden});
  checkpoint.add("b.layers.3.mlp.experts.0.gate_proj.weight", {inter, hidden});
  EXPECT_TRUE(contains(refusal(checkpoint), "\"a.layers\" and \"b.layers\", each of 1"));
}

TEST_F(ExpertStoreTest, an_expert_is_described_with_its_files) {
  EXPECT_EQ(open(small_checkpoint())->describe({1, 2}), "expert 2 of layer 1 (shard-0)");
  const auto spread = ExpertStore::open(write(small_checkpoint(), 3));
  EXPECT_EQ(spread->describe({0, 1}), "expert 1 of layer 0 (shard-0, shard-1, shard-2)");
  Checkpoint biased;
  biased.add_expert({0, 0}, expert_prefix(0, 0), projections, /*with_bias=*/true);
  EXPECT_EQ(ExpertStore::open(write(biased, 6))->describe({0, 0}),
            "expert 0 of layer 0 (shard-0, shard-1, shard-2 and 3 more)");
}

TEST_F(ExpertStoreTest, blobs_stay_readable_after_their_files_were_removed) {
  const Checkpoint checkpoint = small_checkpoint();
  const auto store = open(checkpoint);
  std::filesystem::remove(directory.path() / "shard-0");
  expect_blobs(*store, checkpoint);
}

TEST_F(ExpertStoreTest, a_file_that_is_written_to_is_noticed_and_one_that_is_replaced_is_not) {
  const auto store = ExpertStore::open(write(small_checkpoint(), 2));
  const std::filesystem::path first = directory.path() / "shard-0";
  const std::filesystem::path second = directory.path() / "shard-1";
  store->check_unchanged();
  std::filesystem::rename(directory.write("new", "other"), first);
  std::filesystem::permissions(second, std::filesystem::perms::owner_all);
  store->check_unchanged();
  const auto written = std::filesystem::last_write_time(second);
  std::filesystem::last_write_time(second, written + std::chrono::nanoseconds{1});
  EXPECT_TRUE(contains(message_of<CheckpointChanged>([&] { store->check_unchanged(); }), "shard-1",
                       "load the model again"));
  std::filesystem::resize_file(second, 16);
  std::filesystem::last_write_time(second, written);
  EXPECT_TRUE(contains(message_of<CheckpointChanged>([&] { store->check_unchanged(); }), "now 16"));
}

TEST_F(ExpertStoreTest, an_expert_outside_the_store_is_refused) {
  const auto store = open(small_checkpoint());
  for (const ExpertId outside : {ExpertId{2, 0}, ExpertId{0, 3}}) {
    EXPECT_TRUE(contains(message_of<InvalidArgument>([&] { return store->extents(outside); }),
                         "the store has 2 layers of 3 experts"));
    EXPECT_TRUE(contains(message_of<InvalidArgument>([&] { return store->describe(outside); }),
                         "the store has 2 layers of 3 experts"));
  }
}

TEST_F(ExpertStoreTest, a_missing_tensor_is_named) {
  for (const TestTensor& tensor : small_checkpoint().tensors) {
    Checkpoint checkpoint = small_checkpoint();
    checkpoint.remove(tensor.name);
    EXPECT_TRUE(contains(refusal(checkpoint),
                         "the tensor " + tensor.name + " is missing from shard-0; download"));
  }
}

TEST_F(ExpertStoreTest, a_missing_expert_is_named_by_its_first_tensor) {
  for (const int expert : {0, 1, 2}) {
    Checkpoint checkpoint = small_checkpoint();
    for (const char* name : projections) {
      checkpoint.remove(expert_prefix(1, expert) + name + ".weight");
    }
    EXPECT_TRUE(contains(refusal(checkpoint),
                         "the tensor " + expert_prefix(1, expert) + "gate_proj.weight is missing"));
  }
}

TEST_F(ExpertStoreTest, a_missing_fused_tensor_or_bias_is_named) {
  const std::vector<std::pair<std::string, std::vector<std::uint64_t>>> parts{
      {"gate_up_proj", {3, hidden, 2 * inter}},
      {"down_proj", {3, inter, hidden}},
      {"gate_up_proj_bias", {3, 2 * inter}},
      {"down_proj_bias", {3, hidden}}};
  for (const auto& missing : parts) {
    Checkpoint checkpoint;
    for (const auto& part : parts) {
      if (part != missing) checkpoint.add("layers.0.experts." + part.first, part.second);
    }
    EXPECT_TRUE(contains(refusal(checkpoint),
                         "the tensor layers.0.experts." + missing.first + " is missing"));
  }
}

TEST_F(ExpertStoreTest, a_quantized_layout_is_hinted_at) {
  Checkpoint only_blocks;
  only_blocks.add("layers.0.experts.gate_up_proj_blocks", {3, 8});
  EXPECT_TRUE(contains(refusal<InvalidArgument>(only_blocks),
                       "there is layers.0.experts.gate_up_proj_blocks", "may be quantized"));
  EXPECT_TRUE(
      contains(refusal<InvalidArgument>(only_blocks, {.layers = {0}}), "gate_up_proj_blocks"));
  only_blocks.add("layers.0.experts.gate_up_proj_bias", {3, 2 * inter});
  EXPECT_TRUE(contains(refusal(only_blocks), "layers.0.experts.gate_up_proj is missing",
                       "there is layers.0.experts.gate_up_proj_blocks"));
}

TEST_F(ExpertStoreTest, a_dtype_that_is_not_read_is_named_with_those_that_are) {
  for (const std::string part : {"0.gate_proj", "2.down_proj"}) {
    Checkpoint checkpoint = small_checkpoint();
    TestTensor& tensor = checkpoint.find("model.layers.1.mlp.experts." + part + ".weight");
    tensor.dtype = "F8_E4M3";
    tensor.bytes.resize(tensor.bytes.size() / 2);
    EXPECT_TRUE(contains(refusal(checkpoint), tensor.name + " is of dtype F8_E4M3",
                         "reads F32, F16 and BF16"));
  }
}

TEST_F(ExpertStoreTest, experts_of_different_dtypes_are_refused) {
  Checkpoint checkpoint = small_checkpoint();
  checkpoint.find(expert_prefix(1, 1) + "up_proj.weight").dtype = "F16";
  EXPECT_TRUE(contains(refusal(checkpoint),
                       "experts.1.up_proj.weight is of dtype F16, but "
                       "model.layers.0.mlp.experts.0.gate_proj.weight of BF16"));
}

TEST_F(ExpertStoreTest, experts_of_different_shapes_are_refused) {
  Checkpoint checkpoint = small_checkpoint();
  checkpoint.find(expert_prefix(1, 1) + "up_proj.weight").shape = {hidden, inter};
  EXPECT_TRUE(contains(refusal(checkpoint), "experts.1.up_proj.weight [6, 4] does not fit",
                       "expects it to be [4, 6]"));
}

TEST_F(ExpertStoreTest, layers_of_different_expert_counts_are_refused) {
  Checkpoint checkpoint;
  for (const int layer : {0, 1}) {
    const std::string prefix = "layers." + std::to_string(layer) + ".experts.";
    const std::uint64_t count = layer == 0 ? 3 : 2;
    checkpoint.add(prefix + "gate_up_proj", {count, 2 * inter, hidden});
    checkpoint.add(prefix + "down_proj", {count, hidden, inter});
  }
  EXPECT_TRUE(contains(refusal(checkpoint), "layers.1.experts.gate_up_proj [2, 8, 6] does not fit",
                       "expects it to be [3, 8, 6]"));
}

TEST_F(ExpertStoreTest, shapes_that_are_no_experts_are_refused) {
  using Shape = std::vector<std::uint64_t>;
  for (const auto& [gate_up, down] : std::vector<std::pair<Shape, Shape>>{{{3, 8, 6}, {3, 6, 5}},
                                                                          {{3, 8}, {3, 6, 4}},
                                                                          {{3, 0, 6}, {3, 6, 0}},
                                                                          {{0, 8, 6}, {0, 6, 4}},
                                                                          {{3, 7, 6}, {3, 6, 3}},
                                                                          {{}, {}}}) {
    Checkpoint checkpoint;
    checkpoint.add("layers.0.experts.gate_up_proj", gate_up);
    checkpoint.add("layers.0.experts.down_proj", down);
    EXPECT_TRUE(contains(refusal(checkpoint), "do not fit together", "gate_up [E, 2I, H]"));
  }
  Checkpoint separate;
  separate.add_expert({0, 0}, expert_prefix(0, 0), projections);
  separate.tensors[2].shape = {inter, hidden};
  EXPECT_TRUE(contains(refusal(separate), "do not fit together", "gate [I, H] with down [H, I]"));
}

TEST_F(ExpertStoreTest, too_many_experts_are_refused) {
  Checkpoint checkpoint;
  checkpoint.add_expert({0, 0}, expert_prefix(0, 0), projections);
  checkpoint.add("model.layers.0.mlp.experts.4294967295.up_proj.weight", {inter, hidden});
  EXPECT_TRUE(contains(refusal(checkpoint), "1 layers of 4294967296 experts", "at most 65535"));
}

TEST_F(ExpertStoreTest, experts_named_in_two_ways_are_refused) {
  Checkpoint within = small_checkpoint();
  within.add("model.layers.1.mlp.experts.down_proj", {3, hidden, inter});
  EXPECT_TRUE(contains(refusal(within), "layer 1 has experts named in two ways"));
  Checkpoint beside = small_checkpoint();
  beside.add_expert({0, 0}, "model.layers.1.vision.experts.0.", projections);
  EXPECT_TRUE(contains(refusal(beside), "layer 1 has experts named in two ways"));
  Checkpoint across = small_checkpoint();
  across.add_expert({0, 0}, "model.layers.2.moe.experts.0.", numbered);
  EXPECT_TRUE(contains(refusal(across), "the experts of layers 0 and 2 are named in different ways",
                       "mlp.experts....gate_proj.weight", "moe.experts....w1.weight"));
}

TEST_F(ExpertStoreTest, a_tensor_in_two_shards_is_refused) {
  const Checkpoint checkpoint = small_checkpoint();
  const auto first = directory.write("first", safetensors(checkpoint.tensors));
  const auto second = directory.write("second", safetensors({checkpoint.tensors[4]}));
  EXPECT_TRUE(
      contains(message_of<CheckpointError>([&] { return ExpertStore::open({first, second}); }),
               "experts.1.up_proj.weight in first and", "experts.1.up_proj.weight in second"));
}

TEST_F(ExpertStoreTest, a_wanted_layer_without_experts_is_named) {
  Checkpoint checkpoint = small_checkpoint();
  checkpoint.add("model.layers.3.mlp.experts.gate_up_proj_blocks", {1});
  EXPECT_TRUE(
      contains(refusal(checkpoint, {.layers = {0, 7}}), "layer 7 is asked for", "2 layers"));
  EXPECT_TRUE(contains(refusal(checkpoint, {.layers = {3}}), "layer 3", "gate_up_proj_blocks"));
  EXPECT_TRUE(contains(refusal<InvalidArgument>(checkpoint, {.layers = {1, 1}}),
                       "layer 1 is asked for twice"));
}

TEST_F(ExpertStoreTest, files_without_experts_are_refused_shortly) {
  Checkpoint dense;
  for (int i = 0; i < 500; ++i)
    dense.add("model.layers." + std::to_string(i) + ".mlp.up_proj", {1});
  const std::string message =
      message_of<InvalidArgument>([&] { return ExpertStore::open(write(dense, 5)); });
  EXPECT_TRUE(contains(message, "no tensor in shard-0, shard-1, shard-2 and 2 more"));
  EXPECT_LT(message.size(), 400U);
  EXPECT_TRUE(contains(message_of<InvalidArgument>([] { return ExpertStore::open({}); }),
                       "no files were given"));
}

TEST_F(ExpertStoreTest, a_damaged_shard_is_named) {
  const std::string bytes = safetensors(small_checkpoint().tensors);
  const auto path = directory.write("broken", bytes.substr(0, bytes.size() - 1));
  EXPECT_TRUE(contains(message_of<CheckpointError>([&] { return ExpertStore::open({path}); }),
                       path.string(), "truncated", "download the checkpoint again"));
}

TEST_F(ExpertStoreTest, a_damaged_checkpoint_is_refused_or_read_but_never_crashes) {
  const std::uint32_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random{seed};
  Checkpoint fused;
  fused.add("layers.0.experts.gate_up_proj", {2, 4, 3});
  fused.add("layers.0.experts.down_proj", {2, 3, 2});
  for (const Checkpoint& checkpoint : {fused, small_checkpoint()}) {
    const std::string whole = safetensors(checkpoint.tensors);
    const std::size_t header_end = whole.find("}}") + 2;
    int opened = 0;
    int refused = 0;
    for (int round = 0; round < 1000; ++round) {
      std::string bytes = whole;
      bytes[8 + random() % (header_end - 8)] = static_cast<char>(' ' + random() % 95);
      if (random() % 8 == 0) bytes.resize(random() % bytes.size());
      try {
        const auto store = ExpertStore::open({directory.write("damaged", bytes)});
        ++opened;
        for (std::uint16_t expert = 0; expert < store->expert_count(); ++expert) {
          EXPECT_EQ(read_blob(*store, {0, expert}).size(), store->format().bytes());
        }
      } catch (const CheckpointError&) {
        ++refused;
      } catch (const InvalidArgument&) {
        ++refused;
      }
    }
    EXPECT_GT(opened, 0);  // what the metadata says does not matter
    EXPECT_GT(refused, 0);
  }
}

}  // namespace
}  // namespace spmoe
