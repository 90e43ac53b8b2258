#include "schedule/scheduler.hpp"

#include <algorithm>
#include <string>
#include <utility>

#include "base/error.hpp"

namespace spmoe {
namespace {

// A pass of more tokens is a prompt, which needs nearly every expert.
constexpr std::uint32_t verified_tokens = 32;

}  // namespace

Scheduler::Scheduler(const SchedulerShape& shape, const PolicyNames& names)
    : shape_{shape},
      prefetch_row_{prefetch_policy(names)},
      eviction_row_{eviction_policy(names)},
      slots_{shape.slot_count, shape.layer_count, shape.expert_count},
      forecast_{shape},
      history_{shape},
      trace_{shape.layer_count, shape.expert_count},
      recorded_{shape.layer_count, shape.expert_count},
      eviction_{eviction_row_.make({shape_, slots_, forecast_, history_, trace_})},
      prefetch_{prefetch_row_.make({shape_, slots_, forecast_, history_, trace_}, limits_)},
      queue_{std::size_t{shape.layer_count} * shape.expert_count},
      fills_(shape.slot_count),
      wants_(shape.expert_count, Want::none),
      critical_(std::size_t{shape.layer_count} * shape.expert_count, 0),
      needed_(std::size_t{shape.layer_count} * shape.expert_count, 0),
      one_row_(shape.expert_count, 1),
      stats_(shape.layer_count) {
  landed_.reserve(shape.expert_count);
  candidates_.reserve(shape.slot_count);
  ranked_.reserve(shape.expert_count);
  changes_.reserve(shape.slot_count);
}

void Scheduler::reset() {
  slots_ = SlotTable{shape_.slot_count, shape_.layer_count, shape_.expert_count};
  forecast_ = UseForecast{shape_};
  history_ = ActivationHistory{shape_};
  trace_ = RoutingTrace{shape_.layer_count, shape_.expert_count};
  recorded_ = trace_;
  recording_ = iterating_ = false;
  limits_ = {};
  const PolicyView view{shape_, slots_, forecast_, history_, trace_};
  eviction_ = eviction_row_.make(view);
  prefetch_ = prefetch_row_.make(view, limits_);
  queue_ = TransferQueue{critical_.size()};
  std::ranges::fill(fills_, FillState{});
  changes_.clear();
  layer_ = next_layer_ = 0;
  ahead_layer_ = no_layer;
  std::ranges::fill(wants_, Want::none);
  landed_.clear();
  std::ranges::fill(critical_, std::uint8_t{0});
  std::ranges::fill(needed_, std::uint8_t{0});
  std::ranges::fill(stats_, LayerStats{});
}

void Scheduler::begin_request() {
  if (iterating_) end_iteration();
  history_.begin_request();
}

void Scheduler::predict(std::uint16_t layer, std::span<const float> scores,
                        PredictionSource source) {
  LayerStats& stats = stats_.at(layer);
  ++stats.predictions;
  iterating_ = true;
  if (forecast_.ran(layer)) return;
  forecast_.predict(layer, scores);
  const std::size_t k = shape_.experts_per_token;
  const std::size_t top = std::max(k, count_selected(scores));
  ranked_.clear();
  append_critical(scores, top + k, ranked_);
  for (std::size_t rank = 0; rank < ranked_.size(); ++rank) {
    std::uint8_t& critical = critical_[std::size_t{layer} * shape_.expert_count + ranked_[rank]];
    if (rank < top) critical = 1;
    if (critical == 0) critical = 2;
  }
  prefetch_->on_prediction({layer, source, scores}, queue_);
}

void Scheduler::plan(std::span<const ExpertId> experts) {
  iterating_ = true;
  for (std::uint16_t layer = 0; layer < shape_.layer_count; ++layer) {
    if (layer != ahead_layer_) queue_.cancel_layer(layer, FillKind::prefetch);
  }
  for (std::size_t i = experts.size(); i-- > 0;) {  // an expert's first place counts
    queue_.push(experts[i], FillKind::prefetch, static_cast<double>(i));
  }
}

void Scheduler::need(std::uint16_t layer, std::span<const std::uint16_t> experts,
                     std::span<const std::uint32_t> rows, std::uint32_t tokens) {
  LayerStats& stats = stats_.at(layer);
  if (rows.empty()) rows = std::span{one_row_}.first(experts.size());
  iterating_ = true;
  layer_ = layer;
  next_layer_ = static_cast<std::uint16_t>((layer + 1) % shape_.layer_count);
  ahead_layer_ = no_layer;
  for (const std::uint16_t expert : experts) {
    const ExpertId id{layer, expert};
    const auto slot = slots_.find(id);
    wants_.at(expert) = Want::waiting;
    if (!slot || fills_[*slot].withdrawn) {
      ++stats.misses;
      queue_.push(id, FillKind::demand);
    } else if (slots_[*slot].state == SlotState::resident) {
      ++stats.hits;
      become_ready(*slot);
    } else {
      ++stats.late;
      if (fills_[*slot].issued) {
        become_ready(*slot);
      } else if (fills_[*slot].kind == FillKind::prefetch) {
        change(*slot, FillChange::To::promoted);
      }
    }
  }
  forget_predictions(layer);
  count_repeated(layer, experts);
  count_recall(layer, experts);
  forecast_.observe(layer, experts, rows, tokens);
  history_.observe(layer, experts, rows);
  trace_.advance(layer, experts);
  if (recording_) recorded_.append(layer, experts);
  prefetch_->on_need(layer, experts, queue_);
  withdraw_unwanted(layer);
  if (experts.size() == shape_.expert_count || tokens > verified_tokens)
    read_ahead(static_cast<std::uint16_t>(layer + 1));
}

void Scheduler::count_repeated(std::uint16_t layer, std::span<const std::uint16_t> experts) {
  const std::span needed =
      std::span{needed_}.subspan(std::size_t{layer} * shape_.expert_count, shape_.expert_count);
  for (const std::uint16_t expert : experts) stats_[layer].repeated += needed[expert];
  std::ranges::fill(needed, std::uint8_t{0});
  for (const std::uint16_t expert : experts) needed[expert] = 1;
}

void Scheduler::count_recall(std::uint16_t layer, std::span<const std::uint16_t> experts) {
  if (!forecast_.predicted(layer)) return;
  LayerStats& stats = stats_[layer];
  std::uint8_t* critical = critical_.data() + std::size_t{layer} * shape_.expert_count;
  stats.predicted_needs += experts.size();
  for (const std::uint16_t expert : experts) {
    stats.recalled += critical[expert] == 1 ? 1 : 0;
    stats.recalled_2k += critical[expert] != 0 ? 1 : 0;
  }
  for (std::uint16_t expert = 0; expert < shape_.expert_count; ++expert) {
    stats.critical += critical[expert] == 1 ? 1 : 0;
    critical[expert] = 0;
  }
}

void Scheduler::forget_predictions(std::uint16_t layer) {
  stats_[layer].cancelled += queue_.cancel_layer(layer, FillKind::prefetch);
  for (SlotIndex slot = 0; slot < shape_.slot_count; ++slot) {
    if (slots_[slot].expert.layer == layer) fills_[slot].fresh = false;
  }
}

bool Scheduler::waited_for(ExpertId expert) const {
  return expert.layer == layer_ && wants_[expert.expert] == Want::waiting;
}

void Scheduler::withdraw_unwanted(std::uint16_t layer) {
  for (SlotIndex slot = 0; slot < shape_.slot_count; ++slot) {
    if (slots_[slot].expert.layer == layer) withdraw_unless_kept(slot);
  }
}

void Scheduler::read_ahead(std::uint16_t layer) {
  if (layer >= shape_.layer_count) return;
  ahead_layer_ = layer;
  for (std::uint16_t expert = 0; expert < shape_.expert_count; ++expert) {
    const auto slot = slots_.find({layer, expert});
    if (slot && !fills_[*slot].withdrawn) {
      fills_[*slot].fresh = true;  // or its neighbours would be read into its place
    } else {
      queue_.push({layer, expert}, FillKind::prefetch);
    }
  }
}

void Scheduler::become_ready(SlotIndex slot) {
  const std::uint16_t expert = slots_[slot].expert.expert;
  slots_.lease(slot);
  eviction_->on_use(slot);
  FillState& fill = fills_[slot];
  if (fill.unused) stats_[layer_].prefetch_used_bytes += shape_.blob_bytes;
  fill.unused = fill.fresh = false;
  wants_[expert] = Want::leased;
  landed_.push_back({expert, slot});
}

void Scheduler::release(SlotIndex slot) {
  slots_.release(slot);
  if (slots_[slot].leases == 0 && std::exchange(fills_[slot].failed, false)) {
    slots_.abort_fill(slot);
  }
}

void Scheduler::take_ready(std::vector<ReadyExpert>& ready) {
  for (ReadyExpert& landed : landed_) {
    FillState& fill = fills_[landed.slot];
    landed.landing = fill.issued;
    fill.computed_behind |= fill.issued;
  }
  ready.insert(ready.end(), landed_.begin(), landed_.end());
  landed_.clear();
}

void Scheduler::computed(std::uint16_t expert) {
  wants_.at(expert) = Want::none;
  release(slots_.find({layer_, expert}).value());
}

void Scheduler::abandon_need() {
  for (std::uint16_t expert = 0; expert < shape_.expert_count; ++expert) {
    const Want want = std::exchange(wants_[expert], Want::none);
    const ExpertId id{layer_, expert};
    if (want == Want::leased) release(slots_.find(id).value());
    if (want != Want::waiting || queue_.cancel(id)) continue;
    // Under way for nobody now: as good as a prefetch.
    if (const auto slot = slots_.find(id)) fills_[*slot] = {FillKind::prefetch, true};
  }
  landed_.clear();
}

void Scheduler::end_iteration() {
  iterating_ = false;
  for (std::uint16_t layer = 0; layer < shape_.layer_count; ++layer) {
    stats_[layer].cancelled += queue_.cancel_layer(layer, FillKind::prefetch);
  }
  // What stays fresh is what a prediction asked for whose layer did not run.
  for (SlotIndex slot = 0; slot < shape_.slot_count; ++slot) {
    fills_[slot].fresh &= forecast_.predicted(slots_[slot].expert.layer);
  }
  next_layer_ = 0;
  ahead_layer_ = no_layer;
  std::ranges::fill(critical_, std::uint8_t{0});
  forecast_.end_iteration();
  eviction_->on_end_iteration();
  prefetch_->on_end_iteration(queue_);
  for (SlotIndex slot = 0; slot < shape_.slot_count; ++slot) {
    if (std::exchange(fills_[slot].fresh, false)) withdraw_unless_kept(slot);
  }
}

void Scheduler::replay(RoutingTrace trace) {
  if (trace.layer_count() != shape_.layer_count || trace.expert_count() != shape_.expert_count) {
    throw InvalidArgument{"a trace of " + std::to_string(trace.layer_count()) + " layers of " +
                          std::to_string(trace.expert_count()) + " experts given, but there are " +
                          std::to_string(shape_.layer_count) + " layers of " +
                          std::to_string(shape_.expert_count)};
  }
  trace_ = std::move(trace);
  trace_.rewind();
}

void Scheduler::record(bool on) {
  recording_ = on;
  if (on) recorded_ = RoutingTrace{shape_.layer_count, shape_.expert_count};
}

SlotIndex Scheduler::resident_count() const {
  return static_cast<SlotIndex>(
      std::ranges::count(slots_.slots(), SlotState::resident, &Slot::state));
}

}  // namespace spmoe
