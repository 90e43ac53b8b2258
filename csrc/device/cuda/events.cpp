#include "device/cuda/events.hpp"

#include <utility>

namespace spmoe::cuda {

void ConsumerEvents::retire_passed() {
  while (!open_.empty() && open_.front().waiters == 0) {
    const cudaError_t status = cudaEventQuery(open_.front().event.get());
    if (status == cudaErrorNotReady) {
      static_cast<void>(cudaGetLastError());
      return;
    }
    check(status, "work on the consumer's stream");
    Open passed = open_.pop();
    free(passed.how).push_back(std::move(passed.event));
    ++first_;
  }
}

ConsumerEvents::Open* ConsumerEvents::find(EventId event) {
  return event < first_ ? nullptr : &open_[event - first_];
}

EventId ConsumerEvents::record(cudaStream_t consumer, HostWait how) {
  const CurrentDevice device{device_index_};
  const std::scoped_lock lock{mutex_};
  retire_passed();
  std::vector<Event>& events = free(how);
  if (events.empty()) events.push_back(make_event(how == HostWait::sleep));
  SPMOE_CUDA_TRY(cudaEventRecord(events.back().get(), consumer));
  open_.push({std::move(events.back()), how, 0});
  events.pop_back();
  return first_ + open_.size() - 1;
}

void ConsumerEvents::make_stream_wait(cudaStream_t stream, EventId event) {
  const std::scoped_lock lock{mutex_};
  if (const Open* open = find(event)) {
    SPMOE_CUDA_TRY(cudaStreamWaitEvent(stream, open->event.get(), 0));
  }
}

void ConsumerEvents::wait(EventId event) {
  cudaEvent_t recorded = nullptr;
  {
    const std::scoped_lock lock{mutex_};
    Open* open = find(event);
    if (open == nullptr) return;
    ++open->waiters;
    recorded = open->event.get();
  }
  const cudaError_t status = cudaEventSynchronize(recorded);
  {
    const std::scoped_lock lock{mutex_};
    --find(event)->waiters;
  }
  check(status, "work on the consumer's stream");
}

}  // namespace spmoe::cuda
