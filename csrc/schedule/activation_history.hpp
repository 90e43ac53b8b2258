#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "schedule/use_forecast.hpp"

namespace spmoe {

/// Activation matrices of past requests, [layer, expert] counts of rows, and the one most like the
/// current request so far. After construction it allocates nothing. One thread.
///
/// Source: MoE-Infinity, arXiv:2401.14361, section 4 (expert activation matrix, cosine distance).
class ActivationHistory {
 public:
  explicit ActivationHistory(const SchedulerShape& shape);

  /// A request begins: the matrix of the one before joins the past, in place of the oldest.
  void begin_request();

  /// `layer` ran `experts`, `rows[i]` rows through `experts[i]`.
  void observe(std::uint16_t layer, std::span<const std::uint16_t> experts,
               std::span<const std::uint32_t> rows);

  /// Share of the layer's activations that the expert had in the nearest past request; 0 if there
  /// is none. Looks for the nearest again if a layer ran since the last call.
  [[nodiscard]] float share(ExpertId expert) const;

  [[nodiscard]] const SchedulerShape& shape() const noexcept { return shape_; }

 private:
  using Matrix = std::vector<float>;  // [layer, expert]
  void find_nearest() const;

  static constexpr std::size_t kept_requests = 32;
  SchedulerShape shape_;
  Matrix current_;
  std::vector<Matrix> past_;
  std::size_t past_count_ = 0;
  std::size_t next_past_ = 0;
  mutable const Matrix* nearest_ = nullptr;
  mutable bool outdated_ = false;  // `nearest_`; most policies never ask for it
};

}  // namespace spmoe
