#pragma once

#include <sys/types.h>

#include <array>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.hpp"
#include "base/stats.hpp"
#include "base/trace.hpp"
#include "compute/layer_compute.hpp"
#include "device/buffer.hpp"
#include "device/copy/copy_engine.hpp"
#include "device/device.hpp"
#include "runtime/pinned_store.hpp"
#include "runtime/routed_rows.hpp"
#include "runtime/score_readback.hpp"
#include "schedule/scheduler.hpp"
#include "store/expert_store.hpp"

namespace spmoe {

struct RuntimeOptions {
  std::uint64_t expert_memory_bytes = 0;  ///< for slots; rounded down to whole ones
  std::uint32_t experts_per_token = 0;    ///< the model's top-k: one wave needs so many slots
  ActivationParams activation;
  unsigned compute_threads = 0;  ///< of the host's kernels; 0: one a core
  std::string isa = "auto";      ///< of these; see make_host_expert_ffn
  std::string device = "host";   ///< or "cuda:<index>"
  CopyOptions link;
  std::uint64_t pinned_memory_bytes = 0;  ///< of blobs to hold in pinned memory, if it can be had
  FillProgress pinned_progress;           ///< called while these are read
  PolicyNames policies;
  std::size_t trace_spans = 0;  ///< the latest spans of time to keep; 0: none
};

struct RuntimeStats {
  std::vector<LayerStats> layers;
  LinkStats link;
  SlotIndex slot_count = 0;
  SlotIndex resident_count = 0;
  std::uint64_t iterations = 0;
  std::uint64_t accepted = 0;  ///< draft tokens, over all iterations
  std::string_view isa;        ///< kernels in use
  std::string_view policy;     ///< of prefetching
  std::string_view eviction;
  std::size_t queue_depth = 0;  ///< fills that wait for the link
  std::string_view device;
  std::uint64_t pinned_bytes = 0;         ///< of blobs in pinned memory
  double pinned_fill_s = 0;               ///< reading them took so long
  std::uint64_t dropped_predictions = 0;  ///< that came from the device too late, or too many
};

/// Runs the routed experts of a model whose blobs rest in a store, in a fixed pool of slots.
/// Owns the device, the slots, the scheduler and the copy engine. Thread-safe: calls of `forward`
/// take turns, everything else only takes a short lock. Open until `close`; every call but `stats`
/// then throws Error. Belongs to the process that made it: in a forked child, which has none of its
/// threads, every call but `close` throws Error, and it must not be destroyed. Lost once the device
/// has failed for good; every call but `stats` and `close` then throws DeviceError.
class Runtime {
 public:
  /// Allocates all slots.
  /// @throws InvalidArgument if the budget is under one wave, naming the bytes needed;
  ///         OutOfMemory if the device has not got it.
  Runtime(std::shared_ptr<const ExpertStore> store, const RuntimeOptions& options);
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;
  ~Runtime();

  /// Whether this is the process that made it.
  [[nodiscard]] bool in_own_process() const noexcept;

  /// out[t] = sum over k of top_k_weights[t, k] * expert(top_k_index[t, k])(x[t]), in fp32, in the
  /// order of k, so that the bits do not depend on residency. Fetches what is missing. Blocks; on
  /// a device with streams only until all of it is enqueued on `args.consumer`.
  /// @throws InvalidArgument if an index is out of range; DeviceError if an expert's bytes could
  ///         not be read, naming expert and file, perhaps those of a call before that had returned.
  ///         The runtime stays usable after either.
  void forward(std::uint16_t layer, const LayerArgs& args);

  /// A request begins; see `Scheduler::begin_request`.
  /// @throws CheckpointChanged if a file that experts are read from was written to.
  void begin_request();

  /// Scores of the target's router for `layer` [expert_count], from anywhere; see
  /// `UseForecast::predict`. Starts prefetches, waits for nothing.
  void predict(std::uint16_t layer, std::span<const float> scores,
               PredictionSource source = PredictionSource::draft);

  /// The same of scores in device memory, made by work on `consumer`: they take effect once that
  /// has run. Predictions of an iteration that has ended meanwhile are dropped.
  void predict(std::uint16_t layer, const float* scores, PredictionSource source,
               std::uintptr_t consumer);

  /// Replaces the prefetches that wait for the link; see `Scheduler::predict`. Waits for nothing.
  /// @throws InvalidArgument if the store has no such expert.
  void plan(std::span<const ExpertId> experts);

  /// Whether each expert is resident or being filled, [layer, expert]: 1 or 0.
  [[nodiscard]] std::vector<std::uint8_t> residency() const;

  /// Sets the limits that the measured costs of the machine allow from now on.
  /// @throws InvalidArgument if there is neither no budget nor one for each layer.
  void set_limits(const PrefetchLimits& limits);

  /// Records every access from now on, or none. Starting forgets the record before.
  void record_routing(bool on);
  [[nodiscard]] RoutingTrace recorded_routing() const;

  /// The routing to come, for policies that replay one.
  void replay_routing(RoutingTrace trace);

  /// The latest spans of time, oldest first.
  [[nodiscard]] std::vector<Span> spans() const;

  /// How often predictions of about the same score came true.
  [[nodiscard]] std::vector<UseForecast::Bucket> calibration() const;

  /// An iteration ended with `accepted` draft tokens. Blocks until all that was computed stands.
  /// @throws DeviceError if it does not, as `forward`.
  void end_iteration(std::uint32_t accepted);

  /// As new: slots are empty, nothing is learnt or recorded, no limits are set, and all counters
  /// start from 0; blobs in pinned memory stay. Cancels the fills in flight. Blocks until they have
  /// ended, and while `forward` runs.
  void reset();

  [[nodiscard]] RuntimeStats stats() const;

  /// Refuses calls from now on, waits for the running `forward`, ends the copies in flight, and
  /// gives back all threads, memory and the store. May be called twice. Does nothing in a forked
  /// child.
  void close();

 private:
  /// Locks `mutex_`. @throws Error, without waiting for anything, in a forked child; Error once
  /// closed; DeviceError once lost.
  [[nodiscard]] std::unique_lock<std::mutex> lock_open() const;
  void require_own_process() const;
  void require_layer(std::uint16_t layer) const;
  /// Throws `failure`, which is being handled, on, with the cure if the device is lost.
  [[noreturn]] void rethrow(const DeviceError& failure);
  /// Asks the device after a failure whether it is lost. Returns `lost_`.
  const std::string& note_loss();
  void run_layer(std::uint16_t layer, const LayerArgs& args);
  [[nodiscard]] const ExpertStore& blobs() const;
  void on_scores(const ScoreReadback::Origin& origin, std::span<const float> scores);
  [[nodiscard]] std::span<const std::int64_t> fetch_index(std::uint16_t layer,
                                                          const LayerArgs& args);
  void run_experts(std::unique_lock<std::mutex>& lock, std::uint16_t layer, const LayerArgs& args);
  void compute_ready(std::unique_lock<std::mutex>& lock, std::uint16_t layer,
                     std::uintptr_t consumer);
  static void throw_failure(std::string& failure);
  void finish_span(Track track, std::uint16_t layer, double start_s, double& total_s);
  void start_fills();
  void on_completion(const Completion& completion);
  void end_fill(const Completion& completion);
  [[nodiscard]] std::byte* slot_data(SlotIndex slot) const;

  const pid_t process_;
  const PolicyNames policies_;
  std::shared_ptr<const ExpertStore> store_;  // until `close`, as `pinned_`
  std::shared_ptr<Device> device_;            // until `close`; `mutex_` guards its end
  const std::string device_name_;
  std::unique_ptr<PinnedStore> pinned_;  // none if nothing is to be pinned
  const std::uint64_t slot_stride_;
  const SlotIndex slot_count_;
  const std::size_t prefetch_window_;  // prefetches on the link at a time

  std::mutex call_mutex_;                  // one forward at a time; guards the next six
  std::unique_ptr<LayerCompute> compute_;  // until `close`
  const std::string isa_;
  RoutedRows rows_;
  std::unique_ptr<PinnedBuffer> index_;  // what the router chose
  std::vector<ExpertTask> tasks_;
  std::vector<ReadyExpert> ready_;

  mutable std::mutex mutex_;  // guards all below; never held while bytes move
  std::condition_variable arrived_;
  bool closing_ = false;
  std::string lost_;  // why the device is lost; empty while it is not
  Scheduler scheduler_;
  std::vector<LayerStats> timings_;  // stall_s and compute_s, by layer
  TraceRing trace_;
  std::string access_failure_;     // why the running access cannot end
  std::string spoiled_;            // why what was computed before does not stand
  std::vector<EventId> last_use_;  // by slot: its next fill waits for that
  std::uint64_t iterations_ = 0;
  std::uint64_t epoch_ = 0;  // iterations and requests: predictions are of one of them
  std::uint64_t accepted_ = 0;
  std::uint64_t dropped_predictions_ = 0;
  std::uint64_t pinned_bytes_ = 0;
  double pinned_fill_s_ = 0;
  bool paused_ = false;                 // no fill starts: while it is reset, and from `close` on
  std::array<double, 2> last_end_s_{};  // of a fill, by kind
  LinkStats link_before_;               // what the link had done when the counters started
  LinkStats link_at_close_;
  std::vector<SlotCopy> copies_;  // being started
  std::unique_ptr<Buffer> pool_;
  std::unique_ptr<CopyEngine> engine_;  // until `close`
  std::shared_ptr<ScoreReadback> readback_;
};

}  // namespace spmoe
