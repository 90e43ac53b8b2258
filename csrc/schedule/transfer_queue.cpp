#include "schedule/transfer_queue.hpp"

#include <algorithm>

namespace spmoe {

TransferQueue::TransferQueue(std::size_t capacity) { waiting_.reserve(capacity); }

void TransferQueue::push(ExpertId expert, FillKind kind) {
  const auto place = std::ranges::find(waiting_, expert, &Entry::expert);
  if (place != waiting_.end()) {
    if (place->kind >= kind) return;
    waiting_.erase(place);
  }
  const auto behind =
      std::ranges::find_if(waiting_, [kind](const Entry& entry) { return entry.kind < kind; });
  waiting_.insert(behind, {expert, kind});
}

bool TransferQueue::cancel(ExpertId expert) {
  const auto place = std::ranges::find(waiting_, expert, &Entry::expert);
  if (place == waiting_.end()) return false;
  waiting_.erase(place);
  return true;
}

std::size_t TransferQueue::cancel_layer(std::uint16_t layer, FillKind kind) {
  return std::erase_if(waiting_, [=](const Entry& entry) {
    return entry.kind == kind && entry.expert.layer == layer;
  });
}

}  // namespace spmoe
