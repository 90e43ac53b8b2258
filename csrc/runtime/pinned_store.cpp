#include "runtime/pinned_store.hpp"

#include <fcntl.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include "base/error.hpp"
#include "base/trace.hpp"
#include "device/copy/read_source.hpp"

namespace spmoe {
namespace {

// Systems that refuse to lock much memory at once may still lock it blob by blob.
constexpr std::uint64_t most_chunk_bytes = std::uint64_t{1} << 30;

// Of what a system lets be locked, this share is left to others: torch, and long prompts.
constexpr std::size_t spared_share = 16;

constexpr std::uint64_t alignment = 256;

}  // namespace

PinnedStore::PinnedStore(std::shared_ptr<const ExpertStore> store, Device& device,
                         std::uint64_t budget_bytes, unsigned threads, const FillProgress& progress)
    : store_{std::move(store)},
      stride_{(store_->format().bytes() + alignment - 1) / alignment * alignment} {
  allocate(device, budget_bytes);
  const double start_s = now_s();
  fill(threads, progress);
  fill_s_ = now_s() - start_s;
}

ExpertId PinnedStore::expert(std::size_t place) const {
  return {static_cast<std::uint16_t>(place % layer_count()),
          static_cast<std::uint16_t>(place / layer_count())};
}

std::uint64_t PinnedStore::pinned_bytes() const noexcept {
  return pinned_.size() * store_->format().bytes();
}

std::span<const Extent> PinnedStore::extents(ExpertId expert) const {
  const std::size_t place = std::size_t{expert.expert} * layer_count() + expert.layer;
  if (expert.layer >= layer_count() || place >= pinned_.size()) return store_->extents(expert);
  return {&pinned_[place], 1};
}

void PinnedStore::allocate(Device& device, std::uint64_t budget_bytes) {
  const std::size_t all = std::size_t{layer_count()} * expert_count();
  std::size_t wanted = std::min<std::size_t>(all, budget_bytes / format().bytes());
  std::size_t chunk = std::max<std::size_t>(most_chunk_bytes / stride_, 1);
  bool refused = false;
  while (wanted > 0 && chunk > 0) {
    chunk = std::min(chunk, wanted);
    try {
      chunks_.push_back(std::make_unique<PinnedBuffer>(device, chunk * stride_));
    } catch (const OutOfMemory&) {
      chunk /= 2;  // the budget is what can be had
      refused = true;
      continue;
    }
    for (std::size_t i = 0; i < chunk; ++i) {
      pinned_.push_back({chunks_.back()->data(), -1, i * stride_, store_->format().bytes()});
    }
    wanted -= chunk;
  }
  if (refused) give_back(pinned_.size() / spared_share + 1);
}

void PinnedStore::give_back(std::size_t blobs) {
  const std::size_t kept = pinned_.size() - std::min(blobs, pinned_.size());
  while (pinned_.size() > kept) {
    pinned_.resize(pinned_.size() - chunks_.back()->bytes() / stride_);
    chunks_.pop_back();
  }
}

void PinnedStore::read(std::size_t place) const {
  // The buffer is this store's own, and nobody else reads it yet.
  auto* to = const_cast<std::byte*>(pinned_[place].data) + pinned_[place].offset;
  for (const Extent& extent : store_->extents(expert(place))) {
    if (const std::string error = read_source(extent, to); !error.empty()) {
      throw DeviceError{"could not read " + describe(expert(place)) + ": " + error};
    }
    if (extent.data == nullptr) {
      ::posix_fadvise(extent.file, static_cast<off_t>(extent.offset),
                      static_cast<off_t>(extent.bytes), POSIX_FADV_DONTNEED);
    }
    to += extent.bytes;
  }
}

void PinnedStore::fill(unsigned threads, const FillProgress& progress) {
  std::atomic<std::size_t> next = 0;
  std::atomic<std::size_t> done = 0;
  std::mutex mutex;
  std::exception_ptr failure;
  const auto read_all = [&](const FillProgress& report) {
    try {
      for (std::size_t place = next++; place < pinned_.size(); place = next++) {
        read(place);
        ++done;
        if (report) report(done * format().bytes(), pinned_bytes());
      }
    } catch (...) {
      const std::scoped_lock lock{mutex};
      failure = std::current_exception();
      next = pinned_.size();
    }
  };
  std::vector<std::jthread> helpers;
  for (unsigned i = 1; i < threads; ++i) helpers.emplace_back(read_all, FillProgress{});
  read_all(progress);
  helpers.clear();
  if (failure) std::rethrow_exception(failure);
  if (progress) progress(pinned_bytes(), pinned_bytes());
}

}  // namespace spmoe
