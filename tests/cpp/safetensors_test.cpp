#include "store/safetensors.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/error.hpp"
#include "checkpoint_files.hpp"
#include "message_of.hpp"

namespace spmoe {
namespace {

class Safetensors : public ::testing::Test {
 protected:
  SafetensorsFile open(const std::string& bytes) const {
    return open_safetensors(directory.write("model.safetensors", bytes));
  }

  /// Why a file of these bytes is refused.
  std::string refusal(const std::string& bytes) const {
    const std::string message = message_of<CheckpointError>([&] { return open(bytes); });
    EXPECT_TRUE(contains(message, (directory.path() / "model.safetensors").string()));
    return message;
  }

  /// Why a file with this header over `data_bytes` bytes is refused.
  std::string header_refusal(const std::string& header, std::size_t data_bytes = 0) const {
    const std::string message = refusal(with_header(header, std::string(data_bytes, 'x')));
    EXPECT_TRUE(contains(message, "download the checkpoint again"));
    return message;
  }

  TemporaryDirectory directory;
};

std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
  return "\"" + name + R"(":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" +
         offsets + "}";
}

TEST_F(Safetensors, tensors_are_listed_in_file_order_with_their_places) {
  const std::string header = "{" + entry("b", "BF16", "[2,3]", "[4,16]") +
                             R"(,"__metadata__":{"format":"pt","note":"\u00fc"},)" +
                             entry("a", "F32", "[]", "[0,4]") + "," +
                             entry("none", "I64", "[0,9]", "[16,16]") + "}   ";
  const SafetensorsFile file = open(with_header(header, std::string(16, 'x')));
  EXPECT_EQ(file.name, "model.safetensors");
  ASSERT_EQ(file.tensors.size(), 3U);
  const std::uint64_t start = 8 + header.size();
  EXPECT_EQ(file.tensors[0].name, "a");
  EXPECT_EQ(file.tensors[0].shape, std::vector<std::uint64_t>{});
  EXPECT_EQ(file.tensors[0].offset, start);
  EXPECT_EQ(file.tensors[1].name, "b");
  EXPECT_EQ(file.tensors[1].dtype, "BF16");
  EXPECT_EQ(file.tensors[1].shape, (std::vector<std::uint64_t>{2, 3}));
  EXPECT_EQ(file.tensors[1].offset, start + 4);
  EXPECT_EQ(file.tensors[1].bytes, 12U);
  EXPECT_EQ(file.tensors[2].bytes, 0U);
}

TEST_F(Safetensors, a_file_without_tensors_is_valid) {
  EXPECT_TRUE(open(safetensors({})).tensors.empty());
}

TEST_F(Safetensors, dtypes_narrower_than_a_byte_are_measured_in_bits) {
  const auto file = open(with_header("{" + entry("a", "F4", "[3,2]", "[0,3]") + "}", "xxx"));
  EXPECT_EQ(file.tensors.front().bytes, 3U);
  EXPECT_TRUE(contains(header_refusal("{" + entry("a", "F4", "[3]", "[0,1]") + "}", 1),
                       "tensor a is F4 [3], but its data_offsets span 1 bytes"));
}

TEST_F(Safetensors, fields_that_the_format_may_gain_are_ignored) {
  const std::string header =
      R"({"a":{"new":[1,-2,"x",null,1.5],"newer":true,"dtype":"U8","shape":[1],"data_offsets":[0,1]}})";
  EXPECT_EQ(open(with_header(header, "x")).tensors.size(), 1U);
}

TEST_F(Safetensors, the_file_stays_readable_after_it_was_removed) {
  const auto path = directory.write("model.safetensors", safetensors({{"a", "U8", {3}, "abc"}}));
  const SafetensorsFile file = open_safetensors(path);
  std::filesystem::remove(path);
  std::string bytes(3, ' ');
  ASSERT_EQ(::pread(file.handle.get(), bytes.data(), 3, static_cast<off_t>(file.tensors[0].offset)),
            3);
  EXPECT_EQ(bytes, "abc");
}

TEST_F(Safetensors, a_handle_closes_its_file_once) {
  static_assert(!std::is_copy_constructible_v<FileHandle>);
  int descriptor = -1;
  {
    FileHandle first{::open("/dev/null", O_RDONLY | O_CLOEXEC)};
    descriptor = first.get();
    FileHandle second{std::move(first)};
    FileHandle third;
    third = std::move(second);
    EXPECT_EQ(third.get(), descriptor);
    EXPECT_NE(::fcntl(descriptor, F_GETFD), -1);
  }
  EXPECT_EQ(::fcntl(descriptor, F_GETFD), -1);
}

TEST_F(Safetensors, a_file_that_cannot_be_opened_is_named_with_the_reason) {
  const auto missing = directory.path() / "missing.safetensors";
  EXPECT_TRUE(contains(message_of<CheckpointError>([&] { return open_safetensors(missing); }),
                       "cannot open " + missing.string(), "No such file"));
  EXPECT_TRUE(
      contains(message_of<CheckpointError>([&] { return open_safetensors(directory.path()); }),
               "is not a file"));
  const auto pipe = directory.path() / "pipe";
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  EXPECT_TRUE(contains(message_of<CheckpointError>([&] { return open_safetensors(pipe); }),
                       "is not a file"));
}

TEST_F(Safetensors, a_truncated_file_is_refused) {
  EXPECT_TRUE(contains(refusal(""), "truncated: it has 0 bytes"));
  EXPECT_TRUE(contains(refusal("1234567"), "truncated: it has 7 bytes"));
  const std::string whole = safetensors({{"a", "U8", {2}, "ab"}, {"b", "U8", {3}, "cde"}});
  EXPECT_TRUE(contains(refusal(whole.substr(0, 20)), "truncated: it announces a header of",
                       "only 12 more"));
  EXPECT_TRUE(contains(refusal(whole.substr(0, whole.size() - 1)),
                       "truncated: tensor b ends at byte 5 of the data, but there are only 4"));
}

TEST_F(Safetensors, an_absurd_header_length_is_refused_before_memory_is_taken) {
  EXPECT_TRUE(contains(refusal(std::string(8, '\xff') + "{}"),
                       "announces a header of 18446744073709551615 bytes, more than the limit"));
}

TEST_F(Safetensors, a_git_lfs_pointer_is_recognised) {
  EXPECT_TRUE(
      contains(refusal("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"),
               "run git lfs pull"));
}

TEST_F(Safetensors, a_header_that_is_not_json_is_refused) {
  for (const std::string header :
       {"", "   ", "{", "nonsense", R"({"a":)", "{} x", R"({"a":{"b":1,}})"}) {
    EXPECT_TRUE(contains(header_refusal(header), "header is not JSON")) << header;
  }
  EXPECT_TRUE(contains(header_refusal("{\"\xff\xfe\":1}"), "not JSON in UTF-8"));
  EXPECT_TRUE(contains(header_refusal(std::string{"{}\0{}", 5}), "not JSON in UTF-8 (byte 3)"));
}

TEST_F(Safetensors, a_header_of_another_structure_is_refused) {
  for (const std::string header :
       {"1", "null", "\"a\"", "[]", "[{}]", R"({"a":1})", R"({"a":[]})"}) {
    EXPECT_TRUE(contains(header_refusal(header), "not a JSON object of objects")) << header;
  }
  const std::string deep(1'000'000, '[');
  EXPECT_TRUE(contains(header_refusal(deep), "not a JSON object"));
  EXPECT_TRUE(contains(header_refusal(R"({"a":{"b":)" + deep), "unexpected value in \"a\""));
  for (const std::string fields :
       {R"("b":{})", R"("dtype":5)", R"("dtype":["F32"])", R"("shape":3)", R"("shape":[-1])",
        R"("shape":[1.0])", R"("shape":["1"])", R"("shape":[18446744073709551616])",
        R"("shape":[[1]])", R"("data_offsets":[0,1,2])", R"("data_offsets":[null])"}) {
    EXPECT_TRUE(contains(header_refusal(R"({"a":{)" + fields + "}}"), "unexpected value in \"a\""))
        << fields;
  }
}

TEST_F(Safetensors, a_tensor_without_a_field_is_refused) {
  for (const std::string fields :
       {"", R"("shape":[],"data_offsets":[0,1])", R"("dtype":"U8","data_offsets":[0,1])",
        R"("dtype":"U8","shape":[])", R"("dtype":"U8","shape":[],"data_offsets":[0])"}) {
    EXPECT_TRUE(contains(header_refusal(R"({"a":{)" + fields + "}}", 1), "lacks the dtype"))
        << fields;
  }
}

TEST_F(Safetensors, a_repeated_key_is_refused) {
  const std::string a = entry("a", "U8", "[1]", "[0,1]");
  EXPECT_TRUE(contains(header_refusal("{" + a + "," + a + "}", 1), "names the tensor a twice"));
  EXPECT_TRUE(contains(
      header_refusal(R"({"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1),
      "tensor a has dtype twice"));
}

TEST_F(Safetensors, tensors_that_overlap_are_refused) {
  EXPECT_TRUE(contains(
      header_refusal(
          "{" + entry("a", "U8", "[4]", "[0,4]") + "," + entry("b", "U8", "[4]", "[3,7]") + "}", 7),
      "tensor b overlaps tensor a by 1 bytes"));
}

TEST_F(Safetensors, bytes_that_belong_to_no_tensor_are_refused) {
  EXPECT_TRUE(contains(header_refusal("{" + entry("a", "U8", "[4]", "[1,5]") + "}", 5),
                       "1 bytes between the header and tensor a belong to no tensor"));
  EXPECT_TRUE(contains(header_refusal("{" + entry("a", "U8", "[4]", "[0,4]") + "," +
                                          entry("b", "U8", "[4]", "[6,10]") + "}",
                                      10),
                       "2 bytes between tensor a and tensor b"));
  EXPECT_TRUE(contains(header_refusal("{" + entry("a", "U8", "[4]", "[0,4]") + "}", 9),
                       "its last 5 bytes belong to no tensor"));
}

TEST_F(Safetensors, offsets_outside_the_file_are_refused) {
  EXPECT_TRUE(contains(header_refusal("{" + entry("a", "U8", "[4]", "[4,0]") + "}", 4),
                       "data_offsets that run backwards, from 4 to 0"));
  EXPECT_TRUE(contains(
      header_refusal(
          "{" + entry("a", "U8", "[18446744073709551615]", "[0,18446744073709551615]") + "}", 4),
      "ends at byte 18446744073709551615 of the data, but there are only 4"));
}

TEST_F(Safetensors, a_shape_that_contradicts_the_offsets_is_refused) {
  EXPECT_TRUE(contains(header_refusal("{" + entry("a", "F16", "[2,3]", "[0,13]") + "}", 13),
                       "tensor a is F16 [2, 3], but its data_offsets span 13 bytes"));
  // 2^62 * 4 bytes is 0 modulo 2^64.
  EXPECT_TRUE(
      contains(header_refusal("{" + entry("a", "F32", "[4611686018427387904]", "[0,0]") + "}"),
               "but its data_offsets span 0 bytes"));
  EXPECT_TRUE(
      contains(header_refusal("{" + entry("a", "U8", "[1,2,3,4,5,6,7,8]", "[0,1]") + "}", 1),
               "[1, 2, 3, 4, 5, ..., 8]"));
}

TEST_F(Safetensors, an_unknown_dtype_is_refused) {
  EXPECT_TRUE(contains(header_refusal("{" + entry("a", "F7", "[4]", "[0,4]") + "}", 4),
                       "tensor a has the unknown dtype \"F7\""));
}

TEST_F(Safetensors, a_message_never_quotes_an_endless_name) {
  const std::string name(5000, 'n');
  const std::string by_name = header_refusal("{" + entry(name, "U8", "[1]", "[0,1]") + "}", 2);
  EXPECT_TRUE(contains(by_name, "a name of 5000 bytes"));
  EXPECT_LT(by_name.size(), 300U);
  EXPECT_LT(header_refusal("{" + entry("a", name, "[1]", "[0,1]") + "}", 1).size(), 300U);
}

TEST_F(Safetensors, a_damaged_file_is_refused_or_read_but_never_crashes) {
  const std::uint32_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random{seed};
  const std::string whole = safetensors({{"model.a", "BF16", {2, 3}, std::string(12, 'a')},
                                         {"model.b", "F32", {4}, std::string(16, 'b')},
                                         {"model.c", "I8", {}, "c"}});
  int refused = 0;
  for (int round = 0; round < 2000; ++round) {
    std::string bytes = whole;
    for (auto flips = random() % 4; flips > 0; --flips) {
      bytes[random() % bytes.size()] = static_cast<char>(static_cast<unsigned char>(random()));
    }
    if (random() % 4 == 0) bytes.resize(random() % bytes.size());
    try {
      for (const TensorInfo& tensor : open(bytes).tensors) {
        EXPECT_LE(tensor.offset, bytes.size());
        EXPECT_LE(tensor.bytes, bytes.size() - tensor.offset);
      }
    } catch (const CheckpointError&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 0);
  EXPECT_LT(refused, 2000);
}

}  // namespace
}  // namespace spmoe
