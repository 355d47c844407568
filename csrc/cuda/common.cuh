// Helpers of several kernels: conversions, sums over a block, and the launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "launchers.h"

namespace smi_fast {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__host__ __device__ inline float to_float(float value) { return value; }
__host__ __device__ inline float to_float(__half value) { return __half2float(value); }
__host__ __device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__host__ __device__ T from_float(float value);
template <>
__host__ __device__ inline float from_float(float value) {
  return value;
}
template <>
__host__ __device__ inline __half from_float(float value) {
  return __float2half_rn(value);
}
template <>
__host__ __device__ inline __nv_bfloat16 from_float(float value) {
  return __float2bfloat16_rn(value);
}

template <typename T>
__device__ T warp_sum(T value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, offset);
  }
  return value;
}

// Sums COUNT values over a block of WARPS warps, always in the same order. Thread i < COUNT returns
// sum i, and the others zero. A kernel may call it only once.
template <int COUNT, int WARPS>
__device__ double block_sum(const double (&values)[COUNT], int thread) {
  __shared__ double warps[WARPS][COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const double sum = warp_sum(values[i]);
    if (thread % kWarp == 0) warps[thread / kWarp][i] = sum;
  }
  __syncthreads();
  double total = 0.0;
  if (thread < COUNT) {
    for (int warp = 0; warp < WARPS; ++warp) total += warps[warp][thread];
  }
  return total;
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Launches a kernel. An empty grid is no error: there is no work.
template <typename... P, typename... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, int64_t shared_bytes,
                   cudaStream_t stream, A... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
}

// Calls launcher(T{}) with the element type T that `type` stands for.
template <typename F>
cudaError_t with_type(Type type, F launcher) {
  switch (type) {
    case Type::kFloat:
      return launcher(float{});
    case Type::kHalf:
      return launcher(__half{});
    case Type::kBFloat16:
      return launcher(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace smi_fast
