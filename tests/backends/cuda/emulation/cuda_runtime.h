// The part of CUDA's language and runtime that the kernels use; see emulation.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <utility>

#include "emulation.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
// Blocks run one after another on one OS thread, so one copy serves them all.
#define __shared__ static

struct uint2 {
  unsigned x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 : emulation::Dim3 {};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

inline void __syncthreads(int line = __builtin_LINE()) { emulation::barrier(line); }

inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  emulation::collective([](auto&, unsigned) {}, nullptr, mask, line, true);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int = 32, int line = __builtin_LINE()) {
  struct Operands {
    T value, result;
    int source;
  } mine{value, {}, source % emulation::kWarp};
  const emulation::Collective run = [](void* const(&lanes)[emulation::kWarp], unsigned mask) {
    for (int i = 0; i < emulation::kWarp; ++i) {
      if (!(mask >> i & 1)) continue;
      auto* operands = static_cast<Operands*>(lanes[i]);
      if (!(mask >> operands->source & 1)) emulation::fail("shuffle from a lane outside its mask");
      operands->result = static_cast<Operands*>(lanes[operands->source])->value;
    }
  };
  emulation::collective(run, &mine, mask, line, false);
  return mine.result;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int flipped, int = 32, int line = __builtin_LINE()) {
  return __shfl_sync(mask, value, emulation::lane() ^ flipped, 32, line);
}

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
using cudaStream_t = struct CUstream_st*;
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

// Limits of shared memory by device and kernel, how often one was set, and the current device.
inline std::map<std::pair<int, const void*>, size_t> emulated_shared_limits;
inline int emulated_limits_set = 0, emulated_device = 0;

template <typename... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int bytes) {
  emulated_shared_limits[{emulated_device, reinterpret_cast<const void*>(kernel)}] = bytes;
  ++emulated_limits_set;
  return cudaSuccess;
}

template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...),
                               A&&... arguments) {
  const auto limit =
      emulated_shared_limits.find({emulated_device, reinterpret_cast<const void*>(kernel)});
  const size_t allowed = limit == emulated_shared_limits.end() ? 48 * 1024 : limit->second;
  if (config->dynamicSmemBytes > allowed) return cudaErrorInvalidValue;
  const std::function<void()> thread = [&] { kernel(static_cast<P>(arguments)...); };
  emulation::launch(thread, config->gridDim, config->blockDim, config->dynamicSmemBytes);
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = emulated_device;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulation::kSharedLimit;
  return cudaSuccess;
}

using std::exp2f, std::log2f;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
