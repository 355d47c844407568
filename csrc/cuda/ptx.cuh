// PTX instructions that C++ has no name for. The emulation defines each of them for the host.
#pragma once

#ifndef __CUDACC__
#include "host_ptx.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace smi_fast {

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Starts a copy of 16 bytes from global to shared memory that bypasses registers.
__device__ __forceinline__ void copy_async_16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}

// Waits for the copies of this thread. Those of other threads are visible after a barrier.
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// Loads four 8x8 matrices of 16-bit elements. Lane 8 m + r gives the address of row r of matrix m.
// Elements (r, c) and (r, c + 1) of a matrix go to lane 4 r + c / 2.
__device__ __forceinline__ void load_matrices(unsigned (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// Loads four matrices like load_matrices() and transposes each of them.
__device__ __forceinline__ void load_matrices_transposed(unsigned (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b, where a is 16x16, b 16x8 and d 16x8. The PTX manual says how m16n8k16 spreads them over
// a warp.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const unsigned (&a)[4], unsigned b0,
                                             unsigned b1);
#define SMI_FAST_MULTIPLY_ADD(T, NAME)                                                   \
  template <>                                                                            \
  __device__ __forceinline__ void multiply_add<T>(float (&d)[4], const unsigned (&a)[4], \
                                                  unsigned b0, unsigned b1) {            \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                  \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"            \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));        \
  }
SMI_FAST_MULTIPLY_ADD(__half, "f16")
SMI_FAST_MULTIPLY_ADD(__nv_bfloat16, "bf16")
#undef SMI_FAST_MULTIPLY_ADD

// Rounds two floats to a pair of 16-bit elements, with `low` in the low half.
template <typename T>
__device__ __forceinline__ unsigned pack(float low, float high);
template <>
__device__ __forceinline__ unsigned pack<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const unsigned&>(pair);
}
template <>
__device__ __forceinline__ unsigned pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const unsigned&>(pair);
}

}  // namespace smi_fast

#endif
