#include "fake_cuda.hpp"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "device/cuda/handle.hpp"

// That the fake notices what it is there to notice.
namespace spmoe::fake_cuda {
namespace {

using Violations = std::vector<std::string>;

/// A buffer on the device and one in page-locked memory.
struct Buffers {
  static constexpr std::size_t bytes = 64;
  Buffers() {
    void* raw = nullptr;
    SPMOE_CUDA_TRY(cudaMalloc(&raw, bytes));
    device = cuda::UniqueHandle<void*, cudaFree>{raw};
    SPMOE_CUDA_TRY(cudaHostAlloc(&raw, bytes, cudaHostAllocPortable));
    pinned = cuda::UniqueHandle<void*, cudaFreeHost>{raw};
  }
  [[nodiscard]] std::span<const std::byte> on_device() const {
    return {static_cast<const std::byte*>(device.get()), bytes};
  }
  [[nodiscard]] cudaError_t copy_in(cudaStream_t stream) const {
    return cudaMemcpyAsync(device.get(), pinned.get(), bytes, cudaMemcpyHostToDevice, stream);
  }
  cuda::UniqueHandle<void*, cudaFree> device;
  cuda::UniqueHandle<void*, cudaFreeHost> pinned;
};

TEST(FakeCuda, notices_what_two_streams_do_without_order) {
  Session session;
  const Buffers buffers;
  const cuda::Stream copies = cuda::make_stream();
  const cuda::Stream compute = cuda::make_stream();
  const cuda::Event copied = cuda::make_event(/*blocking=*/true);
  const cuda::Event used = cuda::make_event(/*blocking=*/true);
  for (const bool ordered : {true, false}) {
    EXPECT_EQ(buffers.copy_in(copies.get()), cudaSuccess);
    EXPECT_EQ(cudaEventRecord(copied.get(), copies.get()), cudaSuccess);
    if (ordered) SPMOE_CUDA_TRY(cudaStreamWaitEvent(compute.get(), copied.get(), 0));
    EXPECT_EQ(launch(compute.get(), {buffers.on_device()}, [] {}), cudaSuccess);
    EXPECT_EQ(session.take_violations(),
              ordered ? Violations{} : Violations{"read while its fill may be in flight"});
    EXPECT_EQ(cudaEventRecord(used.get(), compute.get()), cudaSuccess);
    if (ordered) SPMOE_CUDA_TRY(cudaStreamWaitEvent(copies.get(), used.get(), 0));
  }
  EXPECT_EQ(buffers.copy_in(copies.get()), cudaSuccess);
  EXPECT_EQ(session.take_violations(), Violations{"written while it may be read"});
  EXPECT_EQ(cudaStreamSynchronize(compute.get()), cudaSuccess);
  EXPECT_EQ(buffers.copy_in(copies.get()), cudaSuccess);  // now the host has waited
  EXPECT_EQ(session.take_violations(), Violations{});
  EXPECT_EQ(cudaStreamSynchronize(copies.get()), cudaSuccess);
}

TEST(FakeCuda, notices_a_batch_on_the_null_stream) {
  Session session;
  const Buffers buffers;
  void* dst = buffers.device.get();
  const void* src = buffers.pinned.get();
  cudaMemcpyAttributes attributes{cudaMemcpySrcAccessOrderStream, 0};
  std::size_t first = 0;
  EXPECT_EQ(cudaMemcpyBatchAsync(&dst, &src, &Buffers::bytes, 1, &attributes, &first, 1, nullptr),
            cudaErrorInvalidValue);
  EXPECT_EQ(session.take_violations().size(), 1u);
  static_cast<void>(cudaGetLastError());
}

TEST(FakeCuda, notices_a_copy_from_memory_that_is_not_page_locked) {
  Session session;
  const Buffers buffers;
  const std::vector<std::byte> pageable(Buffers::bytes);
  EXPECT_EQ(cudaMemcpyAsync(buffers.device.get(), pageable.data(), Buffers::bytes,
                            cudaMemcpyHostToDevice, nullptr),
            cudaErrorInvalidValue);
  EXPECT_EQ(session.take_violations().size(), 1u);
  static_cast<void>(cudaGetLastError());
}

TEST(FakeCuda, counts_what_is_left_behind) {
  const Session session;
  {
    const Buffers buffers;
    const cuda::Stream stream = cuda::make_stream();
    const cuda::Event event = cuda::make_event(/*blocking=*/false);
    EXPECT_EQ(session.leftovers(),
              "1 streams, 1 events, 1 device allocations, 1 pinned allocations");
  }
  EXPECT_EQ(session.leftovers(), "");
}

TEST(FakeCuda, fails_the_nth_call_once) {
  Session session;
  session.fail("cudaMalloc", 2, cudaErrorMemoryAllocation);
  void* one = nullptr;
  void* two = nullptr;
  EXPECT_EQ(cudaMalloc(&one, 8), cudaSuccess);
  EXPECT_EQ(cudaMalloc(&two, 8), cudaErrorMemoryAllocation);
  EXPECT_EQ(cudaGetLastError(), cudaErrorMemoryAllocation);
  EXPECT_EQ(cudaMalloc(&two, 8), cudaSuccess);
  EXPECT_EQ(cudaFree(one), cudaSuccess);
  EXPECT_EQ(cudaFree(two), cudaSuccess);
}

TEST(FakeCuda, fails_every_call_once_its_context_is_broken_and_lets_everything_go) {
  Session session;
  const Buffers buffers;
  const cuda::Stream stream = cuda::make_stream();
  const cuda::Event copied = cuda::make_event(/*blocking=*/true);
  session.lose_context_at_copy(2, cudaErrorIllegalAddress);
  EXPECT_EQ(buffers.copy_in(stream.get()), cudaSuccess);
  EXPECT_EQ(cudaStreamSynchronize(stream.get()), cudaSuccess);
  EXPECT_EQ(buffers.copy_in(stream.get()), cudaSuccess);
  EXPECT_EQ(cudaEventRecord(copied.get(), stream.get()), cudaSuccess);
  EXPECT_EQ(cudaEventSynchronize(copied.get()), cudaErrorIllegalAddress);
  EXPECT_EQ(cudaStreamQuery(nullptr), cudaErrorIllegalAddress);
  EXPECT_EQ(launch(stream.get(), {}, [] {}), cudaErrorIllegalAddress);
}

}  // namespace
}  // namespace spmoe::fake_cuda
