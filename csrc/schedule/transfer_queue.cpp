#include "schedule/transfer_queue.hpp"

#include <algorithm>

namespace spmoe {

TransferQueue::TransferQueue(std::size_t capacity) { waiting_.reserve(capacity); }

void TransferQueue::push(ExpertId expert, FillKind kind, double order) {
  if (kind == FillKind::demand) order = 0;
  const auto place = std::ranges::find(waiting_, expert, &Entry::expert);
  if (place != waiting_.end()) {
    if (place->kind > kind || (place->kind == kind && place->order == order)) return;
    waiting_.erase(place);
  }
  const auto behind = std::ranges::find_if(waiting_, [=](const Entry& entry) {
    return entry.kind < kind || (entry.kind == kind && entry.order > order);
  });
  waiting_.insert(behind, {expert, kind, order});
}

bool TransferQueue::cancel(ExpertId expert) {
  return cancel(expert, FillKind::demand) || cancel(expert, FillKind::prefetch);
}

bool TransferQueue::cancel(ExpertId expert, FillKind kind) {
  return std::erase_if(waiting_, [=](const Entry& entry) {
           return entry.expert == expert && entry.kind == kind;
         }) > 0;
}

std::size_t TransferQueue::cancel_layer(std::uint16_t layer, FillKind kind) {
  return std::erase_if(waiting_, [=](const Entry& entry) {
    return entry.kind == kind && entry.expert.layer == layer;
  });
}

std::size_t TransferQueue::cancel_all(FillKind kind) {
  return std::erase_if(waiting_, [=](const Entry& entry) { return entry.kind == kind; });
}

}  // namespace spmoe
