#include <memory>
#include <vector>

#include "compute/cuda/cuda_layer_compute.hpp"
#include "device/cuda/handle.hpp"
#include "fake_cuda.hpp"

namespace spmoe {
namespace {

/// The host's kernels in the place of CUDA's: run by the consumer's stream, when its turn comes.
class FakeLayerCompute final : public LayerCompute {
 public:
  FakeLayerCompute(const BlobFormat& format, ActivationParams activation, int device)
      : device_{device},
        blob_bytes_{format.bytes()},
        host_{make_host_layer_compute(format, activation, /*thread_count=*/1)},
        ended_{cuda::make_event(/*blocking=*/true)} {}
  ~FakeLayerCompute() override { static_cast<void>(cudaEventSynchronize(ended_.get())); }

  std::string_view name() const noexcept override { return "fake"; }

  void begin(const LayerArgs& args) override {
    const cuda::CurrentDevice current{device_};
    stream_ = reinterpret_cast<cudaStream_t>(args.consumer);
    SPMOE_CUDA_TRY(cudaStreamWaitEvent(stream_, ended_.get(), 0));
    launch({}, [this, args] { host_->begin(args); });
  }

  void run(std::span<const ExpertTask> tasks) override {
    const cuda::CurrentDevice current{device_};
    struct OwnTask {
      const std::byte* blob;
      std::vector<std::uint32_t> token_rows, out_rows;
    };
    std::vector<OwnTask> own;
    std::vector<std::span<const std::byte>> reads;
    for (const ExpertTask& task : tasks) {
      own.push_back({task.blob,
                     {task.token_rows.begin(), task.token_rows.end()},
                     {task.out_rows.begin(), task.out_rows.end()}});
      reads.emplace_back(task.blob, blob_bytes_);
    }
    launch(std::move(reads), [this, own = std::move(own)] {
      std::vector<ExpertTask> again;
      for (const OwnTask& task : own) again.push_back({task.blob, task.token_rows, task.out_rows});
      host_->run(again);
    });
  }

  void end() override {
    const cuda::CurrentDevice current{device_};
    launch({}, [this] { host_->end(); });
    SPMOE_CUDA_TRY(cudaEventRecord(ended_.get(), stream_));
  }

 private:
  void launch(std::vector<std::span<const std::byte>> reads, std::function<void()> kernel) {
    cuda::check(fake_cuda::launch(stream_, std::move(reads), std::move(kernel)),
                "launch of an expert kernel");
  }

  const int device_;
  const std::size_t blob_bytes_;
  const std::unique_ptr<LayerCompute> host_;
  cuda::Event ended_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace

std::unique_ptr<LayerCompute> make_cuda_layer_compute(const BlobFormat& format,
                                                      ActivationParams activation, int index) {
  return std::make_unique<FakeLayerCompute>(format, activation, index);
}

}  // namespace spmoe
