#include "schedule/scheduler.hpp"

#include <algorithm>
#include <utility>

namespace spmoe {

Scheduler::Scheduler(const SchedulerShape& shape, std::unique_ptr<EvictionPolicy> eviction)
    : shape_{shape},
      slots_{shape.slot_count, shape.layer_count, shape.expert_count},
      eviction_{std::move(eviction)},
      queue_{std::size_t{shape.layer_count} * shape.expert_count},
      fills_(shape.slot_count),
      wants_(shape.expert_count, Want::none),
      stats_(shape.layer_count) {
  landed_.reserve(shape.expert_count);
  candidates_.reserve(shape.slot_count);
}

void Scheduler::predict(std::uint16_t layer, std::span<const float>) {
  ++stats_.at(layer).predictions;
}

void Scheduler::need(std::uint16_t layer, std::span<const std::uint16_t> experts) {
  LayerStats& stats = stats_.at(layer);
  layer_ = layer;
  for (const std::uint16_t expert : experts) {
    const ExpertId id{layer, expert};
    const auto slot = slots_.find(id);
    wants_.at(expert) = Want::waiting;
    if (!slot) {
      ++stats.misses;
      queue_.push(id, FillKind::demand);
    } else if (slots_[*slot].state == SlotState::resident) {
      ++stats.hits;
      become_ready(*slot);
    } else {
      ++stats.late;
    }
  }
  forget_predictions(layer);
  if (experts.size() == shape_.expert_count) read_ahead(static_cast<std::uint16_t>(layer + 1));
}

void Scheduler::forget_predictions(std::uint16_t layer) {
  queue_.cancel_layer(layer, FillKind::prefetch);
  for (SlotIndex slot = 0; slot < shape_.slot_count; ++slot) {
    if (slots_[slot].expert.layer == layer) fills_[slot].fresh = false;
  }
}

void Scheduler::read_ahead(std::uint16_t layer) {
  if (layer >= shape_.layer_count) return;
  for (std::uint16_t expert = 0; expert < shape_.expert_count; ++expert) {
    if (const auto slot = slots_.find({layer, expert})) {
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

void Scheduler::take_ready(std::vector<ReadyExpert>& ready) {
  ready.insert(ready.end(), landed_.begin(), landed_.end());
  landed_.clear();
}

void Scheduler::computed(std::uint16_t expert) {
  wants_.at(expert) = Want::none;
  slots_.release(slots_.find({layer_, expert}).value());
}

void Scheduler::abandon_need() {
  for (std::uint16_t expert = 0; expert < shape_.expert_count; ++expert) {
    const Want want = std::exchange(wants_[expert], Want::none);
    const ExpertId id{layer_, expert};
    if (want == Want::leased) slots_.release(slots_.find(id).value());
    if (want == Want::waiting) queue_.cancel(id);
  }
  landed_.clear();
}

bool Scheduler::make_room(FillKind kind) {
  if (slots_.find_empty()) return true;
  // What the pass under way is still to use leaves last, and never for a prefetch.
  for (const bool spare_fresh : {true, false}) {
    candidates_.clear();
    for (SlotIndex slot = 0; slot < shape_.slot_count; ++slot) {
      const Slot& it = slots_[slot];
      if (it.state != SlotState::resident || it.leases > 0) continue;
      if (spare_fresh && fills_[slot].fresh) continue;
      candidates_.push_back({slot, it.expert});
    }
    if (!candidates_.empty()) {
      slots_.evict(eviction_->victim(candidates_, layer_));
      return true;
    }
    if (kind == FillKind::prefetch) return false;
  }
  return false;
}

std::optional<Fill> Scheduler::next_fill(FillKind at_least) {
  if (queue_.empty() || queue_.front().kind < at_least || !make_room(queue_.front().kind)) {
    return std::nullopt;
  }
  const auto [expert, kind] = queue_.front();
  queue_.pop_front();
  const SlotIndex slot = slots_.find_empty().value();
  slots_.begin_fill(slot, expert);
  const bool prefetch = kind == FillKind::prefetch;
  fills_[slot] = {kind, prefetch, prefetch};
  return Fill{expert, slot, kind};
}

void Scheduler::filled(SlotIndex slot) {
  const ExpertId expert = slots_[slot].expert;
  slots_.finish_fill(slot);
  eviction_->on_fill(slot, expert);
  LayerStats& stats = stats_[expert.layer];
  (fills_[slot].kind == FillKind::demand ? stats.demand_bytes : stats.prefetch_bytes) +=
      shape_.blob_bytes;
  if (expert.layer == layer_ && wants_[expert.expert] == Want::waiting) become_ready(slot);
}

bool Scheduler::failed(SlotIndex slot) {
  const ExpertId expert = slots_[slot].expert;
  slots_.abort_fill(slot);
  if (expert.layer != layer_ || wants_[expert.expert] != Want::waiting) return false;
  wants_[expert.expert] = Want::none;
  return true;
}

void Scheduler::end_iteration() {
  for (std::uint16_t layer = 0; layer < shape_.layer_count; ++layer) forget_predictions(layer);
}

SlotIndex Scheduler::resident_count() const {
  return static_cast<SlotIndex>(
      std::ranges::count(slots_.slots(), SlotState::resident, &Slot::state));
}

}  // namespace spmoe
