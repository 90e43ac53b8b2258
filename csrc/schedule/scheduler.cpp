#include "schedule/scheduler.hpp"

#include <algorithm>
#include <utility>

// Predictions and accesses: leases, and the fills that wait for them.
namespace spmoe {
namespace {

// A pass of more tokens is a prompt, which needs nearly every expert.
constexpr std::uint32_t verified_tokens = 32;

PolicyView view_of(const Foresight& foresight, const FillTable& fills) {
  return {foresight.shape,   fills.slots(),     foresight.forecast,
          foresight.history, foresight.trace(), foresight.limits};
}

}  // namespace

Scheduler::Scheduler(const SchedulerShape& shape, const PolicyNames& names)
    : shape_{shape},
      foresight_{std::make_unique<Foresight>(shape)},
      fills_{std::make_unique<FillTable>(shape)},
      eviction_{eviction_policy(names).make(view_of(*foresight_, *fills_))},
      prefetch_{prefetch_policy(names).make(view_of(*foresight_, *fills_))},
      prediction_stats_{shape},
      wants_(shape.expert_count, Want::none),
      one_row_(shape.expert_count, 1) {
  ready_.reserve(shape.expert_count);
  candidates_.reserve(shape.slot_count);
}

void Scheduler::begin_request() {
  if (iterating_) end_iteration();
  foresight_->history.begin_request();
}

void Scheduler::predict(std::uint16_t layer, std::span<const float> scores,
                        PredictionSource source) {
  ++fills_->stats(layer).predictions;
  iterating_ = true;
  if (foresight_->forecast.ran(layer)) return;
  foresight_->forecast.predict(layer, scores);
  prediction_stats_.predict(layer, scores);
  prefetch_->on_prediction({layer, source, scores}, fills_->queue());
}

void Scheduler::predict(std::span<const ExpertId> experts) {
  iterating_ = true;
  TransferQueue& queue = fills_->queue();
  for (std::uint16_t layer = 0; layer < shape_.layer_count; ++layer) {
    if (layer != ahead_layer_) queue.cancel_layer(layer, FillKind::prefetch);
  }
  for (std::size_t i = experts.size(); i-- > 0;) {  // an expert's first place counts
    queue.push(experts[i], FillKind::prefetch, static_cast<double>(i));
  }
}

void Scheduler::access(std::uint16_t layer, std::span<const std::uint16_t> experts,
                       std::span<const std::uint32_t> rows, std::uint32_t tokens) {
  LayerStats& stats = fills_->stats(layer);
  if (rows.empty()) rows = std::span{one_row_}.first(experts.size());
  iterating_ = true;
  layer_ = layer;
  next_layer_ = static_cast<std::uint16_t>((layer + 1) % shape_.layer_count);
  ahead_layer_ = no_layer;
  for (const std::uint16_t expert : experts) {
    const ExpertId id{layer, expert};
    const auto slot = fills_->find(id);
    wants_.at(expert) = Want::waiting;
    if (!slot) {
      ++stats.misses;
      fills_->queue().push(id, FillKind::demand);
    } else if (fills_->slots()[*slot].state == SlotState::resident) {
      ++stats.hits;
      become_ready(*slot);
    } else {
      ++stats.late;
      const FillRecord& fill = (*fills_)[*slot];
      if (fill.state == FillState::issued || fill.state == FillState::read) {
        become_ready(*slot);
      } else if (fill.kind == FillKind::prefetch) {
        fills_->promote(*slot);
      }
    }
  }
  forget_predictions(layer);
  prediction_stats_.observe(layer, experts, foresight_->forecast.predicted(layer), stats);
  foresight_->observe(layer, experts, rows, tokens);
  prefetch_->on_access(layer, experts, fills_->queue());
  for (SlotIndex slot = 0; slot < shape_.slot_count; ++slot) {
    if (fills_->slots()[slot].expert.layer == layer) cancel_unless_kept(slot);
  }
  if (experts.size() == shape_.expert_count || tokens > verified_tokens)
    read_ahead(static_cast<std::uint16_t>(layer + 1));
}

void Scheduler::forget_predictions(std::uint16_t layer) {
  fills_->stats(layer).cancelled += fills_->queue().cancel_layer(layer, FillKind::prefetch);
  for (SlotIndex slot = 0; slot < shape_.slot_count; ++slot) {
    if (fills_->slots()[slot].expert.layer == layer) fills_->keep_for_pass(slot, false);
  }
}

bool Scheduler::waited_for(ExpertId expert) const {
  return expert.layer == layer_ && wants_[expert.expert] == Want::waiting;
}

void Scheduler::read_ahead(std::uint16_t layer) {
  if (layer >= shape_.layer_count) return;
  ahead_layer_ = layer;
  for (std::uint16_t expert = 0; expert < shape_.expert_count; ++expert) {
    if (const auto slot = fills_->find({layer, expert})) {
      fills_->keep_for_pass(*slot, true);  // or its neighbours would be read into its place
    } else {
      fills_->queue().push({layer, expert}, FillKind::prefetch);
    }
  }
}

void Scheduler::become_ready(SlotIndex slot) {
  const std::uint16_t expert = fills_->slots()[slot].expert.expert;
  fills_->lease(slot);
  eviction_->on_use(slot);
  wants_[expert] = Want::leased;
  ready_.push_back({expert, slot});
}

void Scheduler::take_ready(std::vector<ReadyExpert>& ready) {
  for (ReadyExpert& each : ready_) {
    const FillState state = (*fills_)[each.slot].state;
    each.in_flight = state == FillState::issued || state == FillState::read;
    if (each.in_flight) fills_->read(each.slot);
  }
  ready.insert(ready.end(), ready_.begin(), ready_.end());
  ready_.clear();
}

void Scheduler::computed(std::uint16_t expert) {
  wants_.at(expert) = Want::none;
  fills_->release(fills_->slots().find({layer_, expert}).value());
}

void Scheduler::abandon_access() {
  for (std::uint16_t expert = 0; expert < shape_.expert_count; ++expert) {
    const Want want = std::exchange(wants_[expert], Want::none);
    const ExpertId id{layer_, expert};
    if (want == Want::leased) fills_->release(fills_->slots().find(id).value());
    if (want != Want::waiting || fills_->queue().cancel(id)) continue;
    if (const auto slot = fills_->find(id)) fills_->demote(*slot);
  }
  ready_.clear();
}

void Scheduler::end_iteration() {
  iterating_ = false;
  UseForecast& forecast = foresight_->forecast;
  for (std::uint16_t layer = 0; layer < shape_.layer_count; ++layer) {
    fills_->stats(layer).cancelled += fills_->queue().cancel_layer(layer, FillKind::prefetch);
  }
  // Slots that are still kept are those of predictions whose layer did not run.
  for (SlotIndex slot = 0; slot < shape_.slot_count; ++slot) {
    if (!forecast.predicted(fills_->slots()[slot].expert.layer)) fills_->keep_for_pass(slot, false);
  }
  next_layer_ = 0;
  ahead_layer_ = no_layer;
  prediction_stats_.end_iteration();
  forecast.end_iteration();
  eviction_->on_end_iteration();
  prefetch_->on_end_iteration(fills_->queue());
  for (SlotIndex slot = 0; slot < shape_.slot_count; ++slot) {
    if (fills_->keep_for_pass(slot, false)) cancel_unless_kept(slot);
  }
}

}  // namespace spmoe
