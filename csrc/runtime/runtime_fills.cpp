#include "runtime/runtime.hpp"

// The scheduler's fills on their way: started, changed, and what became of them.
namespace spmoe {

void Runtime::start_fills() {
  if (demand_lane_ == nullptr || resetting_) return;
  while (const auto change = scheduler_.fills().next_change()) {
    for (auto* lane : {demand_lane_.get(), prefetch_lane_.get()}) {
      if (change->to == FillChange::To::cancelled) {
        lane->withdraw(change->slot);
      } else {
        lane->promote(change->slot);
      }
    }
  }
  fills_.clear();
  std::size_t demands = 0;  // which come first
  while (const auto fill = scheduler_.next_fill(
             prefetches_ < prefetch_window_ ? FillKind::prefetch : FillKind::demand)) {
    ++(fill->kind == FillKind::demand ? demands : prefetches_);
    fills_.push_back(*fill);
  }
  in_flight_ += fills_.size();
  list_copies();
  const std::span fills{fills_};
  const std::span batches{batches_};
  demand_lane_->submit(fills.first(demands), batches.first(demands));
  prefetch_lane_->submit(fills.subspan(demands), batches.subspan(demands));
}

void Runtime::list_copies() {
  ops_.clear();
  for (const Fill& fill : fills_) {
    std::byte* place = slot_data(fill.slot);
    for (const Extent& extent : blobs().extents(fill.expert)) {
      ops_.push_back({place, extent});
      place += extent.bytes;
    }
  }
  batches_.clear();
  std::span<const CopyOp> rest{ops_};
  for (const Fill& fill : fills_) {
    const std::size_t count = blobs().extents(fill.expert).size();
    batches_.push_back({rest.first(count), last_use_[fill.slot]});
    rest = rest.subspan(count);
  }
}

void Runtime::on_notice(const CopyLane::FillNotice& notice) {
  using What = BatchNotice::What;
  const std::scoped_lock lock{mutex_};
  const Fill& fill = notice.fill;
  const BatchNotice& batch = notice.batch;
  if (batch.what == What::issued) {
    scheduler_.progress(fill.slot, FillOutcome::issued);
    landed_.notify_all();
    return;
  }
  --in_flight_;
  if (fill.kind == FillKind::prefetch) --prefetches_;
  const FillOutcome outcome = batch.what == What::landed      ? FillOutcome::landed
                              : batch.what == What::withdrawn ? FillOutcome::cancelled
                                                              : FillOutcome::failed;
  if (const Spoiled spoiled = scheduler_.progress(fill.slot, outcome, batch.bytes_moved);
      spoiled != Spoiled::nothing) {
    const std::string& loss = note_loss();
    (spoiled == Spoiled::need ? need_failure_ : spoiled_) =
        "could not fill " + store_->describe(fill.expert) + ": " + batch.error + "; " +
        (loss.empty() ? "the request fails, the next one reads it again" : loss);
  }
  start_fills();
  trace_.push({fill.kind == FillKind::demand ? Lane::demand : Lane::prefetch, fill.expert,
               notice.start_s, notice.end_s,
               static_cast<std::uint32_t>(scheduler_.fills().queue().size())});
  landed_.notify_all();
}

}  // namespace spmoe
