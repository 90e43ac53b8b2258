#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "device/cuda/handle.hpp"

/// Operations of the processor beyond C++ that the kernels use. The tests put a file of the same
/// name before this one, whose functions run on the host, and so compile the kernels' own source.
namespace spmoe::cuda {

/// Sixteen bytes, moved by one instruction.
struct alignas(16) Quad {
  std::uint32_t words[4];
};

/// Weights are read once: they take no room in L1, and L2 fetches whole lines.
__device__ inline Quad load_streaming(const void* from) {
  Quad quad;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(quad.words[0]), "=r"(quad.words[1]), "=r"(quad.words[2]), "=r"(quad.words[3])
               : "l"(from));
  return quad;
}

/// A value that other blocks of the same launch wrote: from L2, since L1 may hold what was there
/// before.
__device__ inline float load_shared_by_blocks(const float* from) { return __ldcg(from); }

/// d += a . b, of a warp: `a` is 16 x 16 and `b` 16 x 8, both bfloat16, `d` is 16 x 8 fp32.
/// Track 4 g + t holds rows g and g + 8 of `a` at columns 2t, 2t + 1 (words 0 and 1) and 2t + 8,
/// 2t + 9 (words 2 and 3); column g of `b` at the same rows (words 0 and 1); and of `d` rows g and
/// g + 8 at columns 2t, 2t + 1.
__device__ inline void multiply_add(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                    std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// The low (high) halves of both, that of `first` below.
__device__ inline std::uint32_t low_halves(std::uint32_t first, std::uint32_t second) {
  return __byte_perm(first, second, 0x5410);
}
__device__ inline std::uint32_t high_halves(std::uint32_t first, std::uint32_t second) {
  return __byte_perm(first, second, 0x7632);
}

__device__ inline std::uint32_t bits_of(float value) { return __float_as_uint(value); }
__device__ inline float float_of(std::uint32_t bits) { return __uint_as_float(bits); }

__device__ inline float f16_to_float(std::uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}
__device__ inline std::uint16_t float_to_f16(float value) {
  return __half_as_ushort(__float2half_rn(value));
}
__device__ inline std::uint16_t float_to_bf16(float value) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

__device__ inline void sync_block() { __syncthreads(); }

/// True in every thread of the block if it is in one. Synchronises the block.
__device__ inline bool any_of_block(bool value) { return __syncthreads_or(value ? 1 : 0) != 0; }

/// Makes this thread's writes visible to the device before what it writes next.
__device__ inline void publish() { __threadfence(); }

/// Adds one to a counter of the device; returns what it was.
__device__ inline std::uint32_t arrive(std::uint32_t* counter) { return atomicAdd(counter, 1U); }

/// Enqueues `kernel` on a stream, a cudaStream_t. @throws DeviceError
template <class Args>
void launch(void (*kernel)(Args), dim3 grid, unsigned threads, std::uintptr_t stream,
            const Args& args) {
  void* parameters[] = {const_cast<Args*>(&args)};
  SPMOE_CUDA_TRY(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3{threads},
                                  parameters, 0, reinterpret_cast<cudaStream_t>(stream)));
}

}  // namespace spmoe::cuda
