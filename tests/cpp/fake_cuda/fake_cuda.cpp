#include "fake_cuda.hpp"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <random>
#include <set>
#include <sstream>
#include <thread>
#include <utility>

namespace spmoe::fake_cuda {
namespace {

/// How much of each stream's work is known to be over: by stream number.
using Clock = std::map<int, std::uint64_t>;

void merge(Clock& into, const Clock& other) {
  for (const auto& [stream, time] : other) into[stream] = std::max(into[stream], time);
}

/// The position that `cudaEventRecord` captured: passes when the stream gets there.
struct Recording {
  cudaStream_t stream = nullptr;
  Clock clock;
  bool passed = false;
  cudaError_t status = cudaSuccess;
};

/// An access to device memory, and the work of which stream it was.
struct Access {
  const std::byte* begin;
  const std::byte* end;
  bool write;
  int stream;
  std::uint64_t time;
};

}  // namespace
}  // namespace spmoe::fake_cuda

using spmoe::fake_cuda::Clock;
using spmoe::fake_cuda::Recording;

struct CUevent_st {
  std::shared_ptr<Recording> recording;
};

struct CUstream_st {
  int number = 0;
  Clock clock;
  std::deque<std::function<void(std::unique_lock<std::mutex>&)>> work;
  bool busy = false;
  bool ending = false;
  cudaError_t status = cudaSuccess;  // of copies since the last event
  std::thread thread;
};

namespace spmoe::fake_cuda {
namespace {

/// The whole runtime; one lock for all of it, which nobody holds while bytes move.
struct State {
  std::mutex mutex;
  std::condition_variable changed;
  Settings settings;
  std::minstd_rand random;
  std::map<std::string, std::uint64_t, std::less<>> calls;
  std::map<std::string, std::map<std::uint64_t, cudaError_t>, std::less<>> planted;  // by call
  std::map<Session::Wait, std::function<bool(cudaStream_t)>> forgotten;
  std::uint64_t copies = 0;
  std::uint64_t failing_copy = 0;
  std::uint64_t losing_copy = 0;
  cudaError_t losing_error = cudaSuccess;
  cudaError_t lost = cudaSuccess;  // what every call returns, once the context is broken
  std::map<const std::byte*, std::size_t> device_memory;
  std::map<const std::byte*, std::size_t> pinned_memory;
  std::set<cudaEvent_t> events;
  std::set<cudaStream_t> streams;  // the default stream is not among them
  std::map<int, std::unique_ptr<CUstream_st>> default_streams;  // by device
  Clock host;  // what a wait of the host has seen the end of
  std::vector<Access> accesses;
  std::vector<std::string> violations;
  int next_stream = 1;
};

State* state = nullptr;
thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

bool forgotten(Session::Wait wait, cudaStream_t stream) {
  const auto found = state->forgotten.find(wait);
  return found != state->forgotten.end() && found->second(stream);
}

/// Counts a call. True if it is to do nothing but return `planted`.
bool intercepted(std::string_view function, cudaError_t& planted) {
  const auto name = std::string{function};
  const std::uint64_t nth = ++state->calls[name];
  if (state->lost != cudaSuccess) {
    planted = state->lost;
    return true;
  }
  const auto plants = state->planted.find(function);
  if (plants == state->planted.end()) return false;
  const auto found = plants->second.find(nth);
  if (found == plants->second.end()) return false;
  planted = found->second;
  return true;
}

#define SPMOE_FAKE_CALL()                    \
  const std::scoped_lock lock{state->mutex}; \
  if (cudaError_t planted{}; intercepted(__func__, planted)) return result(planted)

void serve(CUstream_st& stream) {
  std::unique_lock lock{state->mutex};
  while (true) {
    state->changed.wait(lock, [&] { return stream.ending || !stream.work.empty(); });
    if (stream.work.empty()) return;
    const auto work = std::move(stream.work.front());
    stream.work.pop_front();
    stream.busy = true;
    work(lock);
    stream.busy = false;
    state->changed.notify_all();
  }
}

void start(CUstream_st& stream) {
  stream.thread = std::thread{[&stream] { serve(stream); }};
}

void end(CUstream_st& stream) {
  {
    const std::scoped_lock lock{state->mutex};
    stream.ending = true;
  }
  state->changed.notify_all();
  stream.thread.join();
}

CUstream_st& actual(cudaStream_t stream) {
  if (stream != nullptr) return *stream;
  auto& of_device = state->default_streams[current_device];
  if (of_device == nullptr) {
    of_device = std::make_unique<CUstream_st>();
    of_device->number = -1 - current_device;
    start(*of_device);
  }
  return *of_device;
}

void enqueue(CUstream_st& stream, std::function<void(std::unique_lock<std::mutex>&)> work) {
  merge(stream.clock, state->host);
  ++stream.clock[stream.number];
  stream.work.push_back(std::move(work));
  state->changed.notify_all();
}

bool inside(const std::map<const std::byte*, std::size_t>& memory, const void* data,
            std::size_t bytes) {
  const auto* begin = static_cast<const std::byte*>(data);
  auto after = memory.upper_bound(begin);
  if (after == memory.begin()) return false;
  --after;
  return begin + bytes <= after->first + after->second;
}

/// `bytes` of device memory that `stream` is about to read or write, in the order of its newest
/// work. An access that this one stands for, of the same stream and before it, is forgotten.
void note_access(const CUstream_st& stream, std::span<const std::byte> bytes, bool write) {
  const std::byte* begin = bytes.data();
  const std::byte* end = begin + bytes.size();
  if (!inside(state->device_memory, begin, bytes.size())) return;
  std::erase_if(state->accesses, [&](const Access& before) {
    if (before.end <= begin || end <= before.begin) return false;
    const bool covered = begin <= before.begin && before.end <= end;
    if (!before.write && !write) return covered && before.stream == stream.number;
    const auto seen = stream.clock.find(before.stream);
    if (seen == stream.clock.end() || seen->second < before.time) {
      state->violations.emplace_back(write ? (before.write
                                                  ? "written while a copy into it may be in flight"
                                                  : "written while it may be read")
                                           : "read while its fill may be in flight");
    }
    return write && covered;
  });
  state->accesses.push_back({begin, end, write, stream.number, stream.clock.at(stream.number)});
}

std::chrono::microseconds delay() {
  std::uniform_int_distribution<std::uint32_t> length{0, state->settings.max_delay_us};
  return std::chrono::microseconds{length(state->random)};
}

cudaError_t copy(void* dst, const void* src, std::size_t bytes, cudaStream_t handle) {
  const bool to_device = inside(state->device_memory, dst, bytes);
  const bool pinned = inside(state->pinned_memory, to_device ? src : dst, bytes);
  const bool foreign = state->settings.foreign_device_memory && !to_device &&
                       !inside(state->pinned_memory, src, bytes);
  const bool from_device = foreign || inside(state->device_memory, src, bytes);
  if (to_device == from_device || !pinned) {
    state->violations.emplace_back("a copy that is not between device and page-locked memory");
    return cudaErrorInvalidValue;
  }
  if (to_device) ++state->copies;
  const bool loses = to_device && state->copies == state->losing_copy;
  const bool fails = to_device && state->copies == state->failing_copy;
  CUstream_st& stream = actual(handle);
  enqueue(stream, [=, wait = delay(), &stream](std::unique_lock<std::mutex>& lock) {
    lock.unlock();
    std::this_thread::sleep_for(wait);
    if (!fails && !loses) std::memcpy(dst, src, bytes);
    lock.lock();
    if (fails) stream.status = cudaErrorUnknown;
    if (loses) stream.status = state->lost = state->losing_error;
  });
  const auto* device = static_cast<const std::byte*>(to_device ? dst : src);
  note_access(stream, {device, bytes}, to_device);
  return cudaSuccess;
}

cudaError_t allocate(void** data, std::size_t bytes,
                     std::map<const std::byte*, std::size_t>& memory, std::size_t limit) {
  std::size_t used = 0;
  for (const auto& [start, size] : memory) used += size;
  if (bytes > limit - used) return cudaErrorMemoryAllocation;
  *data = ::operator new(bytes, std::align_val_t{256});
  std::memset(*data, 0, bytes);
  memory.emplace(static_cast<std::byte*>(*data), bytes);
  return cudaSuccess;
}

cudaError_t release(void* data, std::map<const std::byte*, std::size_t>& memory) {
  if (data == nullptr) return cudaSuccess;
  const auto found = memory.find(static_cast<std::byte*>(data));
  if (found == memory.end()) return cudaErrorInvalidValue;
  const std::byte* end = found->first + found->second;
  std::erase_if(state->accesses, [&](const Access& access) {
    return access.begin < end && found->first < access.end;
  });
  memory.erase(found);
  ::operator delete(data, std::align_val_t{256});
  return cudaSuccess;
}

void wait_until_idle(std::unique_lock<std::mutex>& lock, const CUstream_st& stream) {
  state->changed.wait(lock, [&] { return stream.work.empty() && !stream.busy; });
  merge(state->host, stream.clock);
}

void wait_until_all_idle(std::unique_lock<std::mutex>& lock) {
  const auto idle = [](const CUstream_st& stream) { return stream.work.empty() && !stream.busy; };
  state->changed.wait(lock, [&] {
    return std::ranges::all_of(state->streams,
                               [&](cudaStream_t stream) { return idle(*stream); }) &&
           std::ranges::all_of(state->default_streams,
                               [&](const auto& of_device) { return idle(*of_device.second); });
  });
}

/// Counts a call that gives something back. It does so in a broken context too, where nothing
/// waits by itself any more, and returns what such a context returns.
cudaError_t giving_back(std::string_view function, std::unique_lock<std::mutex>& lock) {
  cudaError_t planted{};
  if (!intercepted(function, planted)) return cudaSuccess;
  if (state->lost != cudaSuccess) wait_until_all_idle(lock);
  return planted;
}

}  // namespace

Session::Session(const Settings& settings) {
  state = new State;
  state->settings = settings;
  state->random.seed(settings.delay_seed);
}

Session::~Session() {
  for (auto& [device, stream] : state->default_streams) end(*stream);
  if (const std::string left = leftovers(); !left.empty()) complain("left behind: " + left);
  for (const std::string& violation : state->violations) complain(violation);
  delete std::exchange(state, nullptr);
}

void Session::fail(std::string_view function, std::uint64_t nth, cudaError_t error) {
  const std::scoped_lock lock{state->mutex};
  const auto name = std::string{function};
  state->planted[name][state->calls[name] + nth] = error;
}

void Session::forget(Wait wait, std::function<bool(cudaStream_t)> which) {
  const std::scoped_lock lock{state->mutex};
  state->forgotten[wait] = std::move(which);
}

void Session::remember() {
  std::unique_lock lock{state->mutex};
  state->forgotten.clear();
  wait_until_all_idle(lock);
}

void Session::fail_copy_in_flight(std::uint64_t nth) {
  const std::scoped_lock lock{state->mutex};
  state->failing_copy = state->copies + nth;
}

void Session::lose_context_at_copy(std::uint64_t nth, cudaError_t error) {
  const std::scoped_lock lock{state->mutex};
  state->losing_copy = state->copies + nth;
  state->losing_error = error;
}

void Session::observe_end(cudaStream_t stream) {
  std::unique_lock lock{state->mutex};
  const CUstream_st& of = actual(stream);
  state->changed.wait(lock, [&] { return of.work.empty() && !of.busy; });
}

std::uint64_t Session::calls(std::string_view function) const {
  const std::scoped_lock lock{state->mutex};
  const auto found = state->calls.find(function);
  return found == state->calls.end() ? 0 : found->second;
}

std::vector<std::string> Session::take_violations() {
  const std::scoped_lock lock{state->mutex};
  return std::exchange(state->violations, {});
}

std::string Session::leftovers() const {
  const std::scoped_lock lock{state->mutex};
  std::ostringstream text;
  const auto count = [&](std::size_t found, const char* what) {
    if (found > 0) text << (text.tellp() > 0 ? ", " : "") << found << ' ' << what;
  };
  count(state->streams.size(), "streams");
  count(state->events.size(), "events");
  count(state->device_memory.size(), "device allocations");
  count(state->pinned_memory.size(), "pinned allocations");
  return text.str();
}

cudaError_t launch(cudaStream_t handle, std::vector<std::span<const std::byte>> reads,
                   std::function<void()> kernel, std::vector<std::span<const std::byte>> writes) {
  const std::scoped_lock lock{state->mutex};
  if (cudaError_t planted{}; intercepted("cudaLaunchKernel", planted)) return result(planted);
  CUstream_st& stream = actual(handle);
  enqueue(stream,
          [kernel = std::move(kernel), wait = delay()](std::unique_lock<std::mutex>& work_lock) {
            work_lock.unlock();
            std::this_thread::sleep_for(wait);
            kernel();
            work_lock.lock();
          });
  for (const auto bytes : reads) note_access(stream, bytes, false);
  for (const auto bytes : writes) note_access(stream, bytes, true);
  return cudaSuccess;
}

}  // namespace spmoe::fake_cuda

// The interface of the runtime. Errors are as rare as the backend's use of them.
using namespace spmoe::fake_cuda;

cudaError_t cudaGetDeviceCount(int* count) {
  SPMOE_FAKE_CALL();
  *count = state->settings.device_count;
  return result(state->settings.device_count_status);
}

cudaError_t cudaDriverGetVersion(int* version) {
  SPMOE_FAKE_CALL();
  *version = state->settings.driver_version;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  SPMOE_FAKE_CALL();
  if (device < 0 || device >= state->settings.device_count) return result(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = state->settings.compute_capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = state->settings.compute_capability % 10;
      return cudaSuccess;
    case cudaDevAttrMemoryPoolsSupported:
      *value = state->settings.memory_pools ? 1 : 0;
      return cudaSuccess;
  }
  return result(cudaErrorInvalidValue);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  SPMOE_FAKE_CALL();
  if (device < 0 || device >= state->settings.device_count) return result(cudaErrorInvalidDevice);
  std::strncpy(properties->name, "Fake GPU", sizeof properties->name);
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  SPMOE_FAKE_CALL();
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  SPMOE_FAKE_CALL();
  if (device < 0 || device >= state->settings.device_count) return result(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  SPMOE_FAKE_CALL();
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  SPMOE_FAKE_CALL();
  *total = *free = state->settings.memory_bytes;
  for (const auto& [start, bytes] : state->device_memory) *free -= bytes;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** data, std::size_t bytes) {
  SPMOE_FAKE_CALL();
  return result(allocate(data, bytes, state->device_memory, state->settings.memory_bytes));
}

cudaError_t cudaFree(void* data) {
  std::unique_lock lock{state->mutex};
  const cudaError_t planted = giving_back(__func__, lock);
  const cudaError_t released = release(data, state->device_memory);
  return result(planted != cudaSuccess ? planted : released);
}

cudaError_t cudaMallocAsync(void** data, std::size_t bytes, cudaStream_t handle) {
  SPMOE_FAKE_CALL();
  const cudaError_t status =
      allocate(data, bytes, state->device_memory, state->settings.memory_bytes);
  if (status != cudaSuccess) return result(status);
  // The memory is of this stream; others must be behind this point.
  CUstream_st& stream = actual(handle);
  enqueue(stream, [](std::unique_lock<std::mutex>&) {});
  note_access(stream, {static_cast<const std::byte*>(*data), bytes}, true);
  return cudaSuccess;
}

cudaError_t cudaFreeAsync(void* data, cudaStream_t handle) {
  SPMOE_FAKE_CALL();
  const auto* begin = static_cast<const std::byte*>(data);
  if (!state->device_memory.contains(begin)) return result(cudaErrorInvalidValue);
  CUstream_st& stream = actual(handle);
  enqueue(stream, [data](std::unique_lock<std::mutex>&) { release(data, state->device_memory); });
  note_access(stream, {begin, state->device_memory.at(begin)}, true);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* data, int value, std::size_t bytes, cudaStream_t handle) {
  SPMOE_FAKE_CALL();
  CUstream_st& stream = actual(handle);
  enqueue(stream, [=, wait = delay()](std::unique_lock<std::mutex>& work_lock) {
    work_lock.unlock();
    std::this_thread::sleep_for(wait);
    std::memset(data, value, bytes);
    work_lock.lock();
  });
  note_access(stream, {static_cast<const std::byte*>(data), bytes}, true);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** data, std::size_t bytes, unsigned) {
  SPMOE_FAKE_CALL();
  return result(allocate(data, bytes, state->pinned_memory, state->settings.pinned_bytes));
}

cudaError_t cudaFreeHost(void* data) {
  std::unique_lock lock{state->mutex};
  const cudaError_t planted = giving_back(__func__, lock);
  const cudaError_t released = release(data, state->pinned_memory);
  return result(planted != cudaSuccess ? planted : released);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  SPMOE_FAKE_CALL();
  *stream = new CUstream_st;
  (*stream)->number = state->next_stream++;
  state->streams.insert(*stream);
  start(**stream);
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  cudaError_t planted = cudaSuccess;
  {
    std::unique_lock lock{state->mutex};
    planted = giving_back(__func__, lock);
    if (state->streams.erase(stream) == 0) return result(cudaErrorInvalidValue);
  }
  end(*stream);
  delete stream;
  return result(planted);
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  SPMOE_FAKE_CALL();
  const CUstream_st& of = actual(stream);
  return result(of.work.empty() && !of.busy ? cudaSuccess : cudaErrorNotReady);
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  std::unique_lock lock{state->mutex};
  if (cudaError_t planted{}; intercepted(__func__, planted)) return result(planted);
  wait_until_idle(lock, actual(stream));
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  SPMOE_FAKE_CALL();
  if (!state->events.contains(event)) return result(cudaErrorInvalidValue);
  if (event->recording == nullptr || forgotten(Session::Wait::of_stream, handle)) {
    return cudaSuccess;
  }
  CUstream_st& stream = actual(handle);
  merge(stream.clock, event->recording->clock);
  enqueue(stream, [recording = event->recording](std::unique_lock<std::mutex>& work_lock) {
    state->changed.wait(work_lock, [&] { return recording->passed; });
  });
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  SPMOE_FAKE_CALL();
  *event = new CUevent_st;
  state->events.insert(*event);
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  std::unique_lock lock{state->mutex};
  const cudaError_t planted = giving_back(__func__, lock);
  if (state->events.erase(event) == 0) return result(cudaErrorInvalidValue);
  delete event;
  return result(planted);
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
  SPMOE_FAKE_CALL();
  if (!state->events.contains(event)) return result(cudaErrorInvalidValue);
  CUstream_st& stream = actual(handle);
  const auto recording = std::make_shared<Recording>();
  enqueue(stream, [recording, &stream](std::unique_lock<std::mutex>&) {
    recording->status = std::exchange(stream.status, cudaSuccess);
    recording->passed = true;
  });
  recording->stream = handle;
  recording->clock = stream.clock;
  event->recording = recording;
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  SPMOE_FAKE_CALL();
  if (!state->events.contains(event)) return result(cudaErrorInvalidValue);
  if (event->recording == nullptr) return cudaSuccess;
  if (!event->recording->passed) return result(cudaErrorNotReady);
  merge(state->host, event->recording->clock);
  return result(event->recording->status);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  std::unique_lock lock{state->mutex};
  if (cudaError_t planted{}; intercepted(__func__, planted)) return result(planted);
  if (!state->events.contains(event)) return result(cudaErrorInvalidValue);
  const auto recording = event->recording;
  if (recording == nullptr || forgotten(Session::Wait::of_host, recording->stream)) {
    return cudaSuccess;
  }
  state->changed.wait(lock, [&] { return recording->passed; });
  merge(state->host, recording->clock);
  return result(state->lost != cudaSuccess ? state->lost : recording->status);
}

cudaError_t cudaMemcpyAsync(void* dst, const void* src, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  SPMOE_FAKE_CALL();
  return result(copy(dst, src, bytes, stream));
}

// NOLINTNEXTLINE(readability-non-const-parameter): as CUDA declares it
cudaError_t cudaMemcpyBatchAsync(void* const* dsts, const void* const* srcs,
                                 const std::size_t* sizes, std::size_t count,
                                 cudaMemcpyAttributes* attributes, std::size_t* attribute_indices,
                                 std::size_t attribute_count, cudaStream_t stream) {
  SPMOE_FAKE_CALL();
  if (stream == nullptr || count == 0 || attribute_count == 0 || attribute_indices[0] != 0 ||
      attributes[0].srcAccessOrder == cudaMemcpySrcAccessOrderInvalid) {
    state->violations.emplace_back("a batch on the null stream, of nothing, or without attributes");
    return result(cudaErrorInvalidValue);
  }
  for (std::size_t i = 0; i < count; ++i) {
    const cudaError_t status = copy(dsts[i], srcs[i], sizes[i], stream);
    if (status != cudaSuccess) return result(status);
  }
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorNotReady: return "cudaErrorNotReady";
    case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorUnknown: return "cudaErrorUnknown";
  }
  return "unrecognised";
}

const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }
