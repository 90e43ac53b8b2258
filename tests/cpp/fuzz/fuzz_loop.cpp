// A mutation loop over LLVMFuzzerTestOneInput, for compilers without libFuzzer: random changes of
// a few small files that are made here.
//
//   spmoe_fuzz_store [--seconds=N] [--runs=N] [--seed=N] [FILE]...
//
// With files it reads each once, which repeats a crash. An input that ends the process is left in
// crash.safetensors.

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint_files.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace spmoe {
namespace {

using Random = std::mt19937_64;

std::size_t below(Random& random, std::size_t bound) {
  return std::uniform_int_distribution<std::size_t>{0, bound - 1}(random);
}

TestTensor tensor(const std::string& name, const std::string& dtype,
                  const std::vector<std::uint64_t>& shape) {
  std::uint64_t bytes = dtype == "F32" ? 4 : 2;
  for (const std::uint64_t extent : shape) bytes *= extent;
  return {name, dtype, shape, std::string(bytes, 'w')};
}

/// The layouts that the store reads, each as small as it can be, and two odd ones.
std::vector<std::string> seeds() {
  std::vector<std::string> files;
  using Names = std::array<const char*, 3>;
  for (const auto& [block, names] :
       {std::pair{".mlp.experts.", Names{"gate_proj", "up_proj", "down_proj"}},
        std::pair{".block_sparse_moe.experts.", Names{"w1", "w3", "w2"}}}) {
    for (const char* dtype : {"BF16", "F16", "F32"}) {
      std::vector<TestTensor> tensors{tensor("model.embed_tokens.weight", dtype, {5, 3})};
      for (int layer = 0; layer < 2; ++layer) {
        for (int expert = 0; expert < 2; ++expert) {
          const std::string prefix =
              "model.layers." + std::to_string(layer) + block + std::to_string(expert) + ".";
          tensors.push_back(tensor(prefix + names[0] + ".weight", dtype, {2, 3}));
          tensors.push_back(tensor(prefix + names[1] + ".weight", dtype, {2, 3}));
          tensors.push_back(tensor(prefix + names[2] + ".weight", dtype, {3, 2}));
        }
      }
      files.push_back(safetensors(tensors));
    }
  }
  const std::string fused = "model.layers.0.mlp.experts.";
  files.push_back(safetensors({tensor(fused + "gate_up_proj", "BF16", {2, 3, 4}),
                               tensor(fused + "gate_up_proj_bias", "BF16", {2, 4}),
                               tensor(fused + "down_proj", "BF16", {2, 2, 3}),
                               tensor(fused + "down_proj_bias", "BF16", {2, 3})}));
  const std::string moe = "model.layers.0.block_sparse_moe.";
  files.push_back(safetensors({tensor(moe + "input_linear.weight", "F32", {2, 4, 3}),
                               tensor(moe + "output_linear.weight", "F32", {2, 3, 2})}));
  files.push_back(safetensors({tensor("model.norm.weight", "F32", {3})}));
  files.push_back(with_header("{}", ""));
  return files;
}

/// Parts of a header, and numbers at the edges of what counts them.
constexpr std::array tokens{"{",
                            "}",
                            "[",
                            "]",
                            ",",
                            ":",
                            "\"",
                            "null",
                            "true",
                            "-1",
                            "0",
                            "1e309",
                            "0.5",
                            "\\u0000",
                            "\\ud800",
                            "\xff",
                            "F64",
                            "F8_E4M3",
                            "BF16",
                            "shape",
                            "dtype",
                            "data_offsets",
                            "__metadata__",
                            "65535",
                            "65536",
                            "4294967295",
                            "4294967296",
                            "9223372036854775807",
                            "9223372036854775808",
                            "18446744073709551615",
                            "18446744073709551616",
                            ".experts.",
                            "layers.",
                            "gate_proj"};

void mutate(std::string& file, const std::string& other, Random& random) {
  const std::size_t at = below(random, file.size() + 1);
  const std::size_t length = 1 + below(random, 16);
  const std::string token = tokens[below(random, tokens.size())];
  switch (below(random, 10)) {
    case 0:
      if (at < file.size()) file[at] = static_cast<char>(random());
      break;
    case 1:
      if (at < file.size())
        file[at] =
            static_cast<char>(static_cast<unsigned char>(file[at]) ^ (1U << below(random, 8)));
      break;
    case 2: file.erase(at, length); break;
    case 3: file.insert(at, token); break;
    case 4: file.replace(at, std::min(token.size(), file.size() - at), token); break;
    case 5: file.insert(at, file.substr(below(random, file.size() + 1), length)); break;
    case 6: file.resize(at); break;
    case 7: file = file.substr(0, at) + other.substr(std::min(at, other.size())); break;
    case 8: {  // a number in the header
      const std::size_t digit = file.find_first_of("0123456789", at);
      if (digit != std::string::npos) file[digit] = static_cast<char>('0' + below(random, 10));
      break;
    }
    default: {  // what the header says of its own length, near what it is
      const std::uint64_t bytes = random() % 4 == 0 ? random() : file.size() - 8 + random() % 5;
      for (unsigned i = 0; i < 8 && i < file.size(); ++i) {
        file[i] = static_cast<char>(bytes >> (8 * i));
      }
    }
  }
}

/// Mends the length before the header, so that what was changed within it is read.
void mend_length(std::string& file) {
  const std::size_t end = file.rfind("}  ");
  if (file.size() < 8 || end == std::string::npos || end < 8) return;
  const std::uint64_t bytes = end + 3 - 8;
  for (unsigned i = 0; i < 8; ++i) file[i] = static_cast<char>(bytes >> (8 * i));
}

void run(const std::string& file) {
  static_cast<void>(
      LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(file.data()), file.size()));
}

struct Options {
  std::uint64_t seconds = std::numeric_limits<std::uint64_t>::max();
  std::uint64_t runs = std::numeric_limits<std::uint64_t>::max();
  std::uint64_t seed = std::random_device{}();
  std::vector<std::string> files{};
};

Options parse(int count, char** arguments) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string_view argument = arguments[i];
    const std::size_t equals = argument.find('=');
    const std::string_view name = argument.substr(0, equals);
    std::uint64_t* number = name == "--seconds" ? &options.seconds
                            : name == "--runs"  ? &options.runs
                            : name == "--seed"  ? &options.seed
                                                : nullptr;
    if (number == nullptr) {
      options.files.emplace_back(argument);
      continue;
    }
    const std::string_view digits = argument.substr(std::min(equals, argument.size() - 1) + 1);
    const auto [end, error] =
        std::from_chars(digits.data(), digits.data() + digits.size(), *number);
    if (error != std::errc{} || end != digits.data() + digits.size()) {
      static_cast<void>(std::fprintf(stderr, "%s wants a number\n", arguments[i]));
      std::exit(2);
    }
  }
  return options;
}

/// The input of a run, which needs only the seed and the number of the run.
std::string input(const std::vector<std::string>& corpus, std::uint64_t seed, std::uint64_t run) {
  Random random{seed + run * 0x9E3779B97F4A7C15ULL};
  std::string file = corpus[below(random, corpus.size())];
  for (std::size_t i = 0, changes = 1 + below(random, 4); i < changes; ++i) {
    mutate(file, corpus[below(random, corpus.size())], random);
  }
  if (random() % 2 == 0) mend_length(file);
  return file;
}

void loop(const Options& options, const std::vector<std::string>& corpus, std::uint64_t& done) {
  for (const std::string& file : corpus) run(file);
  const auto start = std::chrono::steady_clock::now();
  for (; done < options.runs; ++done) {
    const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start;
    if (passed.count() >= static_cast<double>(options.seconds)) break;
    run(input(corpus, options.seed, done));
  }
}

/// Runs the loop in a child, so that this process can say which input ended it.
bool fuzz(const Options& options) {
  std::printf("fuzzing the store with --seed=%llu\n",
              static_cast<unsigned long long>(options.seed));
  static_cast<void>(std::fflush(stdout));
  const std::vector<std::string> corpus = seeds();
  void* shared = ::mmap(nullptr, sizeof(std::uint64_t), PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED) std::abort();
  auto& done = *static_cast<std::uint64_t*>(shared);
  const pid_t child = ::fork();
  if (child < 0) std::abort();
  if (child == 0) {
    loop(options, corpus, done);
    ::_exit(0);
  }
  int status = 0;
  if (::waitpid(child, &status, 0) != child) std::abort();
  const auto count = static_cast<unsigned long long>(done);
  if (status == 0) {
    std::printf("%llu inputs, each refused or read within its bounds\n", count);
    return true;
  }
  std::ofstream{"crash.safetensors", std::ios::binary} << input(corpus, options.seed, done);
  std::printf("FAILED: run %llu of --seed=%llu, its input is in crash.safetensors\n", count,
              static_cast<unsigned long long>(options.seed));
  return false;
}

}  // namespace
}  // namespace spmoe

int main(int count, char** arguments) {
  const spmoe::Options options = spmoe::parse(count, arguments);
  if (options.files.empty()) return spmoe::fuzz(options) ? 0 : 1;
  for (const std::string& name : options.files) {
    std::ifstream stream{name, std::ios::binary};
    spmoe::run({std::istreambuf_iterator<char>{stream}, {}});
    std::printf("%s: refused or read within its bounds\n", name.c_str());
  }
}
