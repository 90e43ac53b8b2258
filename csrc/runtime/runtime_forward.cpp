#include <algorithm>
#include <bit>
#include <utility>

#include "base/error.hpp"
#include "runtime/runtime.hpp"

// One access of a layer: which of its experts are ready, and which have to be waited for.
namespace spmoe {
namespace {

// A launch of this many rows fills the machine; more only delays the release of its slots.
constexpr std::size_t launch_rows = 32;

}  // namespace

void Runtime::forward(std::uint16_t layer, const LayerArgs& args) {
  require_own_process();
  const std::scoped_lock call{call_mutex_};  // `close` takes it too, so what is open stays open
  {
    const auto open = lock_open();
    require_layer(layer);
  }
  try {
    run_layer(layer, args);
  } catch (const DeviceError& failure) {
    rethrow(failure);
  }
}

void Runtime::run_layer(std::uint16_t layer, const LayerArgs& args) {
  rows_.assign(fetch_index(layer, args), args.k);
  compute_->begin(args);

  std::unique_lock lock{mutex_};
  throw_failure(spoiled_);
  access_failure_.clear();
  try {
    run_experts(lock, layer, args);
  } catch (...) {
    if (!lock.owns_lock()) lock.lock();
    scheduler_.abandon_access();
    throw;
  }
  lock.unlock();
  compute_->end();
}

std::span<const std::int64_t> Runtime::fetch_index(std::uint16_t layer, const LayerArgs& args) {
  bool behind = false;  // the router behind compute, and that behind the link
  {
    const std::scoped_lock lock{mutex_};
    behind = scheduler_.fills().read_before_arrival();
  }
  const std::size_t count = std::size_t{args.tokens} * args.k;
  const std::size_t bytes = count * sizeof(std::int64_t);
  if (index_ == nullptr || index_->bytes() < bytes) {
    index_.reset();
    index_ = std::make_unique<PinnedBuffer>(*device_, std::bit_ceil(bytes));
  }
  const double start_s = now_s();
  // The one wait of a layer: which experts it needs decides all that follows.
  device_->wait(
      device_->read_back(index_->data(), args.top_k_index, bytes, args.consumer, HostWait::spin));
  const std::scoped_lock lock{mutex_};
  if (behind) finish_span(Track::wait, layer, start_s, timings_[layer].stall_s);
  return {reinterpret_cast<const std::int64_t*>(index_->data()), count};
}

void Runtime::throw_failure(std::string& failure) {
  if (!failure.empty()) throw DeviceError{std::exchange(failure, {})};
}

void Runtime::run_experts(std::unique_lock<std::mutex>& lock, std::uint16_t layer,
                           const LayerArgs& args) {
  scheduler_.access(layer, rows_.experts(), rows_.counts(), args.tokens);
  start_fills();
  for (std::size_t computed = 0; computed < rows_.experts().size();) {
    ready_.clear();
    scheduler_.take_ready(ready_);
    if (!ready_.empty()) {
      computed += ready_.size();
      compute_ready(lock, layer, args.consumer);
    } else {
      throw_failure(access_failure_);
      const double start_s = now_s();
      arrived_.wait(lock);
      finish_span(Track::wait, layer, start_s, timings_[layer].stall_s);
    }
  }
  throw_failure(access_failure_);
}

void Runtime::compute_ready(std::unique_lock<std::mutex>& lock, std::uint16_t layer,
                            std::uintptr_t consumer) {
  for (std::size_t first = 0, last = 0; first < ready_.size(); first = last) {
    tasks_.clear();
    std::size_t rows = 0;
    // An expert in flight runs by itself, so that nothing else waits for it.
    for (;
         last < ready_.size() && (last == first || (rows < launch_rows && !ready_[last].in_flight));
         ++last) {
      tasks_.push_back(rows_.task(ready_[last].expert, slot_data(ready_[last].slot)));
      rows += ready_[last].in_flight ? launch_rows : tasks_.back().out_rows.size();
    }
    lock.unlock();
    const double start_s = now_s();
    if (ready_[first].in_flight) engine_->make_consumer_wait(consumer, ready_[first].slot);
    compute_->run(tasks_);
    const EventId used = device_->record_event(consumer);
    lock.lock();
    finish_span(Track::compute, layer, start_s, timings_[layer].compute_s);
    for (std::size_t i = first; i < last; ++i) {
      last_use_[ready_[i].slot] = used;
      scheduler_.computed(ready_[i].expert);
    }
    start_fills();
  }
}

void Runtime::finish_span(Track track, std::uint16_t layer, double start_s, double& total_s) {
  const double end_s = now_s();
  total_s += end_s - start_s;
  trace_.push({track,
               {layer, Span::whole_layer},
               start_s,
               end_s,
               static_cast<std::uint32_t>(scheduler_.fills().queue().size())});
}

}  // namespace spmoe
