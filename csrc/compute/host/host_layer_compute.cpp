#include <algorithm>
#include <vector>

#include "base/convert.hpp"
#include "compute/layer_compute.hpp"

namespace spmoe {
namespace {

// Call memory beyond so many floats, which only a long prompt needs, is given back.
constexpr std::size_t kept_floats = std::size_t{1} << 20;

void resize_for_call(std::vector<float>& floats, std::size_t count) {
  if (floats.capacity() > std::max(count, kept_floats)) std::vector<float>{}.swap(floats);
  floats.resize(count);
}

class HostLayerCompute final : public LayerCompute {
 public:
  HostLayerCompute(std::size_t hidden, std::unique_ptr<ExpertFfn> ffn)
      : hidden_{hidden}, ffn_{std::move(ffn)} {}

  std::string_view name() const noexcept override { return ffn_->name(); }

  void begin(const LayerArgs& args) override {
    args_ = args;
    resize_for_call(x_, args.tokens * hidden_);
    resize_for_call(expert_out_, std::size_t{args.tokens} * args.k * hidden_);
    widen(args.x, args.x_dtype, x_.size(), x_.data());
  }

  void run(std::span<const ExpertTask> tasks) override {
    ffn_->run(tasks, x_.data(), expert_out_.data());
  }

  void end() override {
    weights_.resize(std::size_t{args_.tokens} * args_.k);
    widen(args_.top_k_weights, args_.weights_dtype, weights_.size(), weights_.data());
    for (std::size_t token = 0; token < args_.tokens; ++token) {
      float* sum = x_.data() + token * hidden_;  // the input has been read
      std::fill_n(sum, hidden_, 0.0F);
      for (std::size_t k = 0; k < args_.k; ++k) {
        const float weight = weights_[token * args_.k + k];
        const float* row = expert_out_.data() + (token * args_.k + k) * hidden_;
        for (std::size_t h = 0; h < hidden_; ++h) sum[h] += weight * row[h];
      }
    }
    narrow(x_.data(), x_.size(), args_.x_dtype, args_.out);
  }

 private:
  const std::size_t hidden_;
  const std::unique_ptr<ExpertFfn> ffn_;
  LayerArgs args_;
  std::vector<float> x_, expert_out_, weights_;
};

}  // namespace

std::unique_ptr<LayerCompute> make_host_layer_compute(const BlobFormat& format,
                                                      ActivationParams activation,
                                                      unsigned thread_count, std::string_view isa) {
  return std::make_unique<HostLayerCompute>(
      format.hidden, make_host_expert_ffn(format, activation, thread_count, isa));
}

}  // namespace spmoe
