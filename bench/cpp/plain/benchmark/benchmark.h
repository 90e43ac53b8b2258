#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

/// The part of Google Benchmark that ours use, for where that library is missing: a table on
/// standard output. It knows `--benchmark_filter`, part of a name, and `--benchmark_min_time`.
namespace benchmark {

struct Counter {
  enum Flags : std::uint8_t { kDefaults, kIsIterationInvariantRate };
  enum OneK : std::uint16_t { kIs1000 = 1000, kIs1024 = 1024 };

  Counter(double number = 0, Flags meaning = kDefaults, OneK = kIs1000)
      : value{number}, flags{meaning} {}

  double value;
  Flags flags;
};

using Clock = std::chrono::steady_clock;

class State {
 public:
  explicit State(double min_s) : min_s_{min_s} {}

  struct Unused {
    // The value that `for (auto _ : state)` names; used by nobody.
    ~Unused() {}
  };
  class Iterator {
   public:
    explicit Iterator(State* state) : state_{state} {}
    bool operator!=(const Iterator&) const { return state_->next(); }
    Iterator& operator++() { return *this; }
    Unused operator*() const { return {}; }

   private:
    State* state_;
  };
  Iterator begin() {
    start_ = Clock::now();
    return Iterator{this};
  }
  Iterator end() { return Iterator{this}; }

  [[nodiscard]] double seconds() const { return seconds_; }
  [[nodiscard]] std::uint64_t iterations() const { return iterations_; }

  std::map<std::string, Counter> counters;

 private:
  bool next() {
    seconds_ = std::chrono::duration<double>(Clock::now() - start_).count();
    if (iterations_ > 0 && seconds_ >= min_s_) return false;
    ++iterations_;
    return true;
  }

  double min_s_;
  double seconds_ = 0;
  std::uint64_t iterations_ = 0;
  Clock::time_point start_;
};

struct Benchmark {
  std::string name;
  std::function<void(State&)> body;

  Benchmark* UseRealTime() { return this; }
};

namespace internal {

struct Session {
  std::vector<std::unique_ptr<Benchmark>> benchmarks;
  std::string filter;
  double min_s = 0.5;
};
inline Session& session() {
  static Session session;
  return session;
}

}  // namespace internal

template <class Body>
Benchmark* RegisterBenchmark(const char* name, Body body) {
  auto& all = internal::session().benchmarks;
  all.push_back(std::make_unique<Benchmark>(Benchmark{name, std::move(body)}));
  return all.back().get();
}

inline void Initialize(int* argc, char** argv) {
  int kept = 1;
  for (int i = 1; i < *argc; ++i) {
    const std::string_view argument{argv[i]};
    const auto value = argument.substr(std::min(argument.size(), argument.find('=') + 1));
    if (argument.starts_with("--benchmark_filter=")) {
      internal::session().filter = value;
    } else if (argument.starts_with("--benchmark_min_time=")) {
      internal::session().min_s = std::strtod(std::string{value}.c_str(), nullptr);
    } else {
      argv[kept++] = argv[i];
    }
  }
  *argc = kept;
}

inline bool ReportUnrecognizedArguments(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) std::cerr << argv[i] << ": unknown argument\n";
  return argc > 1;
}

inline void AddCustomContext(const std::string& key, const std::string& value) {
  std::cout << key << ": " << value << '\n';
}

inline void RunSpecifiedBenchmarks() {
  for (const auto& benchmark : internal::session().benchmarks) {
    if (benchmark->name.find(internal::session().filter) == std::string::npos) continue;
    State state{internal::session().min_s};
    benchmark->body(state);
    const auto runs = static_cast<double>(state.iterations());
    std::cout << benchmark->name << ": " << state.seconds() / runs * 1e6 << " us";
    for (const auto& [name, counter] : state.counters) {
      const bool rate = counter.flags == Counter::kIsIterationInvariantRate;
      std::cout << "  " << name << '='
                << (rate ? counter.value * runs / state.seconds() : counter.value)
                << (rate ? "/s" : "");
    }
    std::cout << '\n';
    std::cout.flush();
  }
}

template <class T>
void DoNotOptimize(const T& value) {
  asm volatile("" : : "r,m"(value) : "memory");
}

}  // namespace benchmark
