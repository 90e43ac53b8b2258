#include "device/copy/held_movers.hpp"

#include <thread>

namespace spmoe {
namespace {

class HeldMover final : public ChunkMover {
 public:
  HeldMover(HeldMovers& movers, std::unique_ptr<ChunkMover> upstream)
      : movers_{movers}, upstream_{std::move(upstream)} {}

  void reserve(std::uint64_t bytes, Clock::time_point submitted) override {
    upstream_->reserve(bytes, submitted);
    ticket_ = movers_.admit(bytes, submitted, Clock::now());
  }

  BegunChunk begin(std::span<const ChunkPart> parts) override {
    if (ticket_.fail) return {0, "read error injected by a test"};
    return {0, upstream_->begin(parts).error};
  }

  std::string finish() override {
    std::string error = upstream_->finish();
    if (ticket_.until != HeldMovers::at_once) std::this_thread::sleep_until(ticket_.until);
    return error;
  }

 private:
  HeldMovers& movers_;
  const std::unique_ptr<ChunkMover> upstream_;
  HeldMovers::Ticket ticket_;  // of the chunk in flight
};

}  // namespace

std::unique_ptr<ChunkMover> HeldMovers::make_mover() {
  return std::make_unique<HeldMover>(*this, upstream_->make_mover());
}

}  // namespace spmoe
