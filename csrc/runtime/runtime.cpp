#include "runtime/runtime.hpp"

#include <unistd.h>

#include <algorithm>
#include <utility>

#include "base/bytes.hpp"
#include "base/error.hpp"
#include "compute/cuda/cuda_layer_compute.hpp"
#include "device/cuda/cuda_device.hpp"
#include "device/make_device.hpp"

namespace spmoe {
namespace {

constexpr std::uint64_t slot_alignment = 256;

// Predictions in flight from the device: some draft steps ahead of the worker.
constexpr std::size_t readbacks_a_layer = 8;

constexpr std::size_t verified_index_bytes = 4096;  // what the router chooses in a verification

std::uint64_t round_up(std::uint64_t bytes, std::uint64_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

SlotIndex slots_in(const ExpertStore& store, const RuntimeOptions& options, std::uint64_t stride) {
  const auto all = std::uint64_t{store.layer_count()} * store.expert_count();
  const auto wave = std::uint64_t{std::max(options.experts_per_token, 1U)};
  if (wave > store.expert_count()) {
    throw InvalidArgument{"experts_per_token is " + std::to_string(wave) +
                          ", but a layer has only " + std::to_string(store.expert_count()) +
                          " experts"};
  }
  const auto slots = options.expert_memory_bytes / stride;
  if (slots < wave) {
    throw InvalidArgument{"expert_memory of " + format_bytes(options.expert_memory_bytes) +
                          " holds " + std::to_string(slots) + " experts of " +
                          format_bytes(stride) + "; one token needs " + std::to_string(wave) +
                          " at once: give at least " + std::to_string(wave * stride) + " bytes (" +
                          format_bytes(wave * stride) + ")"};
  }
  return static_cast<SlotIndex>(std::min(slots, all));
}

/// Prefetches on the link at a time: one that moves and one behind it; of small experts more, or
/// the link idles while the thread that starts the next waits for a core. A slot that is being
/// filled is nobody's victim, so that few slots allow few.
std::size_t prefetches_at_once(std::uint64_t stride, SlotIndex slots) {
  constexpr std::uint64_t wanted_bytes = std::uint64_t{4} << 20;
  const std::uint64_t most = std::clamp<std::uint64_t>(slots / 4, 2, 8);
  return std::clamp<std::uint64_t>((wanted_bytes + stride - 1) / stride, 2, most);
}

std::unique_ptr<Device> make_checked_device(const RuntimeOptions& options) {
  check(options.link);  // before anything is allocated
  return make_device(options.device);
}

std::unique_ptr<LayerCompute> make_layer_compute(const BlobFormat& format,
                                                 const RuntimeOptions& options) {
  if (const auto index = cuda_index(options.device)) {
    return make_cuda_layer_compute(format, options.activation, *index);
  }
  return make_host_layer_compute(format, options.activation, options.compute_threads, options.isa);
}

}  // namespace

Runtime::Runtime(std::shared_ptr<const ExpertStore> store, const RuntimeOptions& options)
    : process_{::getpid()},
      policies_{options.policies},
      store_{std::move(store)},
      device_{make_checked_device(options)},
      device_name_{device_->name()},
      slot_stride_{round_up(store_->format().bytes(), slot_alignment)},
      slot_count_{slots_in(*store_, options, slot_stride_)},
      prefetch_window_{prefetches_at_once(slot_stride_, slot_count_)},
      compute_{make_layer_compute(store_->format(), options)},
      isa_{compute_->name()},
      rows_{store_->expert_count()},
      scheduler_{
          {store_->layer_count(), store_->expert_count(), slot_count_, store_->format().bytes(),
           static_cast<std::uint16_t>(std::max(options.experts_per_token, 1U))},
          policies_},
      timings_(store_->layer_count()),
      trace_{options.trace_spans},
      last_use_(slot_count_, 0),
      pool_{std::make_unique<Buffer>(*device_, slot_count_ * slot_stride_)} {
  index_ = std::make_unique<PinnedBuffer>(*device_, verified_index_bytes);
  tasks_.reserve(store_->expert_count());
  ready_.reserve(store_->expert_count());
  copies_.reserve(store_->expert_count() + prefetch_window_);
  engine_ = std::make_unique<CopyEngine>(
      make_movers(*device_, options.link), slot_count_, options.link,
      [this](const Completion& completion) { on_completion(completion); });
  readback_ = std::make_shared<ScoreReadback>(
      *device_, store_->expert_count(), readbacks_a_layer * store_->layer_count(),
      [this](const ScoreReadback::Origin& origin, std::span<const float> scores) {
        on_scores(origin, scores);
      });
  // After all other pinned memory, for it takes what there is.
  if (options.pinned_memory_bytes > 0) {
    pinned_ = std::make_unique<PinnedStore>(store_, *device_, options.pinned_memory_bytes,
                                            options.link.copy_threads, options.pinned_progress);
    pinned_bytes_ = pinned_->pinned_bytes();
    pinned_fill_s_ = pinned_->fill_s();
  }
}

Runtime::~Runtime() { close(); }

bool Runtime::in_own_process() const noexcept { return process_ == ::getpid(); }

void Runtime::close() {
  if (!in_own_process()) return;
  {
    const std::scoped_lock lock{mutex_};
    closing_ = true;  // or callers in a loop could hold `call_mutex_` for ever between them
  }
  const std::scoped_lock call{call_mutex_};
  if (device_ == nullptr) return;      // closed before
  std::shared_ptr<Device> device;      // goes last
  std::unique_ptr<CopyEngine> engine;  // before it
  std::shared_ptr<ScoreReadback> readback;
  {
    // Nothing more starts; what is in flight still arrives in the pool.
    const std::scoped_lock lock{mutex_};
    paused_ = true;
    readback.swap(readback_);
  }
  readback.reset();
  engine_->close();
  try {
    for (const EventId event : last_use_) device_->wait(event);
  } catch (const DeviceError&) {
    // Work on the slots failed, so it has ended: they may go.
  }
  compute_.reset();
  index_.reset();
  pool_.reset();
  pinned_.reset();
  store_.reset();
  const std::scoped_lock lock{mutex_};
  link_at_close_ = engine_->stats();
  engine.swap(engine_);
  device.swap(device_);
}

const ExpertStore& Runtime::blobs() const { return pinned_ == nullptr ? *store_ : *pinned_; }

void Runtime::require_own_process() const {
  if (in_own_process()) return;
  throw Error{"this Runtime belongs to process " + std::to_string(process_) +
              ", and this is a fork of it, process " + std::to_string(::getpid()) +
              ", without its threads: load after the fork, or start workers by the method "
              "\"spawn\" of multiprocessing"};
}

std::unique_lock<std::mutex> Runtime::lock_open() const {
  require_own_process();
  std::unique_lock lock{mutex_};
  if (closing_) throw Error{"this Runtime is closed; make a new one"};
  if (!lost_.empty()) throw DeviceError{lost_};
  return lock;
}

void Runtime::require_layer(std::uint16_t layer) const {
  if (layer < store_->layer_count()) return;
  throw InvalidArgument{"layer " + std::to_string(layer) +
                        " asked, but the store has MoE layers 0 to " +
                        std::to_string(store_->layer_count() - 1)};
}

const std::string& Runtime::note_loss() {
  if (lost_.empty() && device_ != nullptr) lost_ = device_->lost();
  return lost_;
}

void Runtime::rethrow(const DeviceError& failure) {
  const std::string message = failure.what();
  const std::scoped_lock lock{mutex_};
  if (const std::string& loss = note_loss(); !loss.empty() && !message.ends_with(loss)) {
    throw DeviceError{message + "; " + loss};
  }
  throw;
}

std::byte* Runtime::slot_data(SlotIndex slot) const { return pool_->data() + slot * slot_stride_; }

void Runtime::begin_request() {
  auto lock = lock_open();
  store_->check_unchanged();
  arrived_.wait(lock, [this] { return !scheduler_.fills().read_before_arrival(); });
  spoiled_.clear();  // of the request before
  ++epoch_;
  scheduler_.begin_request();
  start_fills();
}

void Runtime::predict(std::uint16_t layer, std::span<const float> scores, PredictionSource source) {
  const auto lock = lock_open();
  require_layer(layer);
  if (scores.size() != store_->expert_count()) {
    throw InvalidArgument{std::to_string(scores.size()) + " scores given, but a layer has " +
                          std::to_string(store_->expert_count()) + " experts"};
  }
  scheduler_.predict(layer, scores, source);
  start_fills();
}

void Runtime::predict(std::uint16_t layer, const float* scores, PredictionSource source,
                      std::uintptr_t consumer) {
  std::shared_ptr<Device> device;  // which the readback needs, even if `close` runs meanwhile
  std::shared_ptr<ScoreReadback> readback;
  std::uint64_t epoch = 0;
  {
    const auto lock = lock_open();
    require_layer(layer);
    device = device_;
    readback = readback_;
    epoch = epoch_;
  }
  try {
    if (readback->send({layer, source, epoch}, scores, consumer)) return;
  } catch (const DeviceError& failure) {
    rethrow(failure);
  }
  const std::scoped_lock lock{mutex_};
  ++dropped_predictions_;
}

void Runtime::on_scores(const ScoreReadback::Origin& origin, std::span<const float> scores) {
  const std::scoped_lock lock{mutex_};
  if (origin.epoch != epoch_ || paused_) {
    ++dropped_predictions_;
    return;
  }
  scheduler_.predict(origin.layer, scores, origin.source);
  start_fills();
}

void Runtime::plan(std::span<const ExpertId> experts) {
  const auto lock = lock_open();
  for (const ExpertId expert : experts) {
    require_layer(expert.layer);
    if (expert.expert >= store_->expert_count()) {
      throw InvalidArgument{"expert " + std::to_string(expert.expert) +
                            " planned, but a layer has experts 0 to " +
                            std::to_string(store_->expert_count() - 1)};
    }
  }
  scheduler_.predict(experts);
  start_fills();
}

std::vector<std::uint8_t> Runtime::residency() const {
  const auto lock = lock_open();
  std::vector<std::uint8_t> resident(std::size_t{store_->layer_count()} * store_->expert_count());
  for (const Slot& slot : scheduler_.fills().slots().slots()) {
    if (slot.state == SlotState::empty) continue;
    resident[std::size_t{slot.expert.layer} * store_->expert_count() + slot.expert.expert] = 1;
  }
  return resident;
}

void Runtime::set_limits(const PrefetchLimits& limits) {
  const auto lock = lock_open();
  if (!limits.budget_bytes.empty() && limits.budget_bytes.size() != store_->layer_count()) {
    throw InvalidArgument{"budgets for " + std::to_string(limits.budget_bytes.size()) +
                          " layers given, but the store has " +
                          std::to_string(store_->layer_count())};
  }
  scheduler_.foresight().limits = limits;
}

void Runtime::record_routing(bool on) {
  const auto lock = lock_open();
  scheduler_.foresight().record(on);
}

RoutingTrace Runtime::recorded_routing() const {
  const auto lock = lock_open();
  return scheduler_.foresight().recorded();
}

void Runtime::replay_routing(RoutingTrace trace) {
  const auto lock = lock_open();
  scheduler_.foresight().replay(std::move(trace));
}

std::vector<Span> Runtime::spans() const {
  const auto lock = lock_open();
  return trace_.spans();
}

std::vector<UseForecast::Bucket> Runtime::calibration() const {
  const auto lock = lock_open();
  const auto buckets = scheduler_.foresight().forecast.calibration();
  return {buckets.begin(), buckets.end()};
}

void Runtime::end_iteration(std::uint32_t accepted) {
  auto lock = lock_open();
  arrived_.wait(lock, [this] { return !scheduler_.fills().read_before_arrival(); });
  throw_failure(spoiled_);
  ++iterations_;
  ++epoch_;
  accepted_ += accepted;
  scheduler_.end_iteration();
  start_fills();
}

RuntimeStats Runtime::stats() const {
  require_own_process();
  const std::scoped_lock lock{mutex_};
  RuntimeStats stats;
  const FillTable& fills = scheduler_.fills();
  stats.layers.assign(fills.stats().begin(), fills.stats().end());
  for (std::size_t layer = 0; layer < stats.layers.size(); ++layer) {
    stats.layers[layer] += timings_[layer];
  }
  stats.link = engine_ == nullptr ? link_at_close_ : engine_->stats();
  stats.link.bytes -= link_before_.bytes;
  stats.link.busy_s -= link_before_.busy_s;
  stats.slot_count = slot_count_;
  stats.resident_count = fills.resident_count();
  stats.iterations = iterations_;
  stats.accepted = accepted_;
  stats.isa = isa_;
  stats.policy = prefetch_policy(policies_).name;
  stats.eviction = eviction_policy(policies_).name;
  stats.queue_depth = fills.queue().size();
  stats.device = device_name_;
  stats.pinned_bytes = pinned_bytes_;
  stats.pinned_fill_s = pinned_fill_s_;
  stats.dropped_predictions = dropped_predictions_;
  return stats;
}

}  // namespace spmoe
