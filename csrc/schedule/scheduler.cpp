#include "schedule/scheduler.hpp"

#include <algorithm>
#include <string>
#include <utility>

#include "base/error.hpp"

namespace spmoe {
namespace {

// A pass of more tokens is a prompt, which needs nearly every expert.
constexpr std::uint32_t verified_tokens = 32;

constexpr std::size_t none = static_cast<std::size_t>(-1);

}  // namespace

Scheduler::Scheduler(const SchedulerShape& shape, const PolicyNames& names)
    : shape_{shape},
      slots_{shape.slot_count, shape.layer_count, shape.expert_count},
      forecast_{shape},
      history_{shape},
      trace_{shape.layer_count, shape.expert_count},
      recorded_{shape.layer_count, shape.expert_count},
      eviction_{make_eviction_policy(names, {shape_, slots_, forecast_, history_, trace_})},
      prefetch_{
          make_prefetch_policy(names, {shape_, slots_, forecast_, history_, trace_}, limits_)},
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

void Scheduler::withdraw_unless_kept(SlotIndex slot) {
  FillState& fill = fills_[slot];
  if (slots_[slot].state != SlotState::filling || fill.kind != FillKind::prefetch) return;
  const ExpertId expert = slots_[slot].expert;
  if (fill.issued || fill.withdrawn || waited_for(expert) || prefetch_->keeps(expert)) return;
  fill.withdrawn = true;
  change(slot, FillChange::To::withdrawn);
}

void Scheduler::change(SlotIndex slot, FillChange::To to) {
  std::erase_if(changes_, [=](const FillChange& other) { return other.slot == slot; });
  changes_.push_back({slot, to});
}

std::optional<FillChange> Scheduler::next_change() {
  if (changes_.empty()) return std::nullopt;
  const FillChange first = changes_.front();
  changes_.erase(changes_.begin());
  return first;
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

std::optional<SlotIndex> Scheduler::find_victim(FillKind incoming) {
  // What was prefetched for the pass under way leaves last, and never for another prefetch.
  for (const bool spare_fresh : {true, false}) {
    candidates_.clear();
    for (SlotIndex slot = 0; slot < shape_.slot_count; ++slot) {
      const Slot& it = slots_[slot];
      if (it.state != SlotState::resident || it.leases > 0) continue;
      if (spare_fresh && fills_[slot].fresh) continue;
      candidates_.push_back({slot, it.expert});
    }
    if (!candidates_.empty()) return eviction_->victim(candidates_, next_layer_);
    if (incoming == FillKind::prefetch) break;
  }
  return std::nullopt;
}

bool Scheduler::may_evict(const TransferQueue::Entry& incoming, SlotIndex victim) const {
  if (incoming.kind == FillKind::demand) return true;
  const bool certain = incoming.expert.layer == ahead_layer_;  // not a prediction
  return certain || prefetch_->admits({incoming.expert, slots_[victim].expert});
}

std::size_t Scheduler::find_startable(FillKind at_least) {
  bool looked = false;  // for a victim, which is the same for every prefetch until a slot changes
  std::optional<SlotIndex> victim;
  for (std::size_t i = 0; i < queue_.size();) {
    const TransferQueue::Entry entry = queue_[i];
    if (entry.kind < at_least) return none;
    const auto slot = slots_.find(entry.expert);
    // Until the end of a withdrawn fill is told, the expert can neither be read again nor be said
    // to be here. No prefetch passes a demand that waits for that.
    const bool ending = slot && fills_[*slot].withdrawn;
    if (slot && !ending) {
      // Here already, or on its way: it only has to stay until its layer has run.
      if (!std::exchange(fills_[*slot].fresh, true)) looked = false;
      queue_.erase(i);
      continue;
    }
    if (!ending) {
      if (slots_.find_empty()) return i;
      if (!std::exchange(looked, true)) victim = find_victim(entry.kind);
      if (victim && may_evict(entry, *victim)) {
        slots_.evict(*victim);
        return i;
      }
      if (entry.kind == FillKind::demand) return none;
    }
    if (entry.kind == FillKind::demand) at_least = FillKind::demand;
    ++i;
  }
  return none;
}

std::optional<Fill> Scheduler::next_fill(FillKind at_least) {
  const std::size_t place = find_startable(at_least);
  if (place == none) return std::nullopt;
  const auto [expert, kind, order] = queue_[place];
  queue_.erase(place);
  const SlotIndex slot = slots_.find_empty().value();
  slots_.begin_fill(slot, expert);
  const bool prefetch = kind == FillKind::prefetch;
  fills_[slot] = {kind, prefetch, prefetch};
  return Fill{expert, slot, kind};
}

void Scheduler::count_moved(SlotIndex slot, std::uint64_t bytes) {
  LayerStats& stats = stats_[slots_[slot].expert.layer];
  (fills_[slot].kind == FillKind::demand ? stats.demand_bytes : stats.prefetch_bytes) += bytes;
  limits_.moved_bytes += bytes;
}

void Scheduler::forget_fill(SlotIndex slot) {
  fills_[slot].withdrawn = fills_[slot].issued = fills_[slot].computed_behind = false;
  std::erase_if(changes_, [=](const FillChange& change) { return change.slot == slot; });
}

void Scheduler::issued(SlotIndex slot) {
  const ExpertId expert = slots_[slot].expert;
  fills_[slot].issued = true;
  eviction_->on_fill(slot, expert);
  if (!fills_[slot].withdrawn && waited_for(expert)) become_ready(slot);
}

bool Scheduler::computed_ahead() const {
  return std::ranges::any_of(fills_, &FillState::computed_behind);
}

void Scheduler::filled(SlotIndex slot) {
  const ExpertId expert = slots_[slot].expert;
  slots_.finish_fill(slot);
  if (!fills_[slot].issued) eviction_->on_fill(slot, expert);
  count_moved(slot, shape_.blob_bytes);
  forget_fill(slot);
  queue_.cancel(expert, FillKind::demand);  // of one that was withdrawn and needed again
  if (waited_for(expert)) become_ready(slot);
}

void Scheduler::withdrawn(SlotIndex slot, std::uint64_t bytes_moved) {
  const ExpertId expert = slots_[slot].expert;
  count_moved(slot, bytes_moved);
  stats_[expert.layer].cancelled_bytes += shape_.blob_bytes - bytes_moved;
  forget_fill(slot);
  slots_.abort_fill(slot);
  if (waited_for(expert)) queue_.push(expert, FillKind::demand);
}

Spoiled Scheduler::failed(SlotIndex slot, std::uint64_t bytes_moved) {
  const ExpertId expert = slots_[slot].expert;
  const bool leased = slots_[slot].leases > 0;
  const Spoiled spoiled = leased                         ? Spoiled::need
                          : fills_[slot].computed_behind ? Spoiled::results
                                                         : Spoiled::nothing;
  count_moved(slot, bytes_moved);
  forget_fill(slot);
  fills_[slot].failed = leased;
  if (!leased) slots_.abort_fill(slot);
  if (!waited_for(expert)) return spoiled;
  if (fills_[slot].kind == FillKind::prefetch) {
    queue_.push(expert, FillKind::demand);  // only a read of its own can fail a need
    return Spoiled::nothing;
  }
  wants_[expert.expert] = Want::none;
  return Spoiled::need;
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
