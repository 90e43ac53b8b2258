#include "device/cuda_marks.hpp"

#include <utility>

namespace spmoe::cuda {

void Marks::retire_passed() {
  while (!open_.empty() && open_.front().waiters == 0) {
    const cudaError_t status = cudaEventQuery(open_.front().event.get());
    if (status == cudaErrorNotReady) {
      static_cast<void>(cudaGetLastError());
      return;
    }
    check(status, "work on the consumer's stream");
    free_.push_back(open_.pop().event);
    ++first_;
  }
}

Marks::Open* Marks::find(Mark mark) { return mark < first_ ? nullptr : &open_[mark - first_]; }

Mark Marks::record(cudaStream_t consumer) {
  const CurrentDevice device{device_index_};
  const std::scoped_lock lock{mutex_};
  retire_passed();
  if (free_.empty()) free_.push_back(make_event(/*blocking=*/false));
  SPMOE_CUDA_TRY(cudaEventRecord(free_.back().get(), consumer));
  open_.push({std::move(free_.back()), 0});
  free_.pop_back();
  return first_ + open_.size() - 1;
}

void Marks::make_stream_wait(cudaStream_t stream, Mark mark) {
  const std::scoped_lock lock{mutex_};
  if (const Open* open = find(mark)) {
    SPMOE_CUDA_TRY(cudaStreamWaitEvent(stream, open->event.get(), 0));
  }
}

void Marks::wait(Mark mark) {
  cudaEvent_t event = nullptr;
  {
    const std::scoped_lock lock{mutex_};
    Open* open = find(mark);
    if (open == nullptr) return;
    ++open->waiters;
    event = open->event.get();
  }
  const cudaError_t status = cudaEventSynchronize(event);
  {
    const std::scoped_lock lock{mutex_};
    --find(mark)->waiters;
  }
  check(status, "work on the consumer's stream");
}

}  // namespace spmoe::cuda
