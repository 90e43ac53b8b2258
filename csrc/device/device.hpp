#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "base/types.hpp"
#include "device/chunk_mover.hpp"

namespace spmoe {

/// How a thread waits for an event: `spin` wakes at once, `sleep` leaves the core to others.
enum class HostWait : std::uint8_t { spin, sleep };

/// Memory and streams of one processor. Thread-safe. Everything it creates must be destroyed
/// before it.
class Device {
 public:
  virtual ~Device() = default;

  [[nodiscard]] virtual std::string_view name() const noexcept = 0;  ///< "host" or "cuda:<index>"

  /// Device memory, aligned to 256 bytes. @throws OutOfMemory, naming the bytes asked.
  [[nodiscard]] virtual std::byte* allocate(std::size_t bytes) = 0;
  virtual void deallocate(std::byte* data, std::size_t bytes) noexcept = 0;

  /// Host memory that the device copies from and to by itself. @throws OutOfMemory.
  [[nodiscard]] virtual std::byte* allocate_pinned(std::size_t bytes) = 0;
  virtual void deallocate_pinned(std::byte* data, std::size_t bytes) noexcept = 0;

  /// How chunks move to this device. `chunk_bytes` is the most bytes of one; 0: the device's
  /// choice.
  [[nodiscard]] virtual std::unique_ptr<ChunkMovers> make_movers(std::uint64_t chunk_bytes) = 0;

  /// Records an event at the present end of the queue of `consumer`. @throws DeviceError.
  [[nodiscard]] virtual EventId record_event(std::uintptr_t consumer) = 0;

  /// Enqueues on `consumer` a copy of device memory into pinned memory, and returns the event
  /// behind it, for which `wait` waits as `how` says. @throws DeviceError.
  [[nodiscard]] virtual EventId read_back(std::byte* pinned, const void* data, std::size_t bytes,
                                          std::uintptr_t consumer, HostWait how) = 0;

  /// Blocks the calling thread until `event` has passed. @throws DeviceError if work before failed.
  virtual void wait(EventId event) = 0;

  /// Why this process can never use the device again, and the cure; empty while it can. To be asked
  /// after a failure; waits for nothing.
  [[nodiscard]] virtual std::string lost() const = 0;
};

}  // namespace spmoe
