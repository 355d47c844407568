// Code of attention and its gradient: the rows of one (image, head) in shared memory, softmax over
// tiles of scores, and the launch.
#pragma once

#include <atomic>
#include <cmath>
#include <type_traits>

#include "warp_tiles.cuh"

namespace smi_fast {

constexpr int kMaxWarps = 8;

// The tokens of this block's (image, head).
struct Tokens {
  int64_t image, head;
  int count, tiles;  // valid tokens, and tiles of 16 that cover them
  float scale;       // of scores, 1 / sqrt(D)

  __device__ Tokens(const int64_t* lengths, const AttentionShape& shape)
      : image(blockIdx.x / static_cast<unsigned>(shape.heads)),
        head(blockIdx.x % static_cast<unsigned>(shape.heads)),
        count(static_cast<int>(shape.tokens)),
        scale(rsqrtf(static_cast<float>(shape.width))) {
    if (lengths != nullptr && lengths[image] < count) {
      count = lengths[image] < 0 ? 0 : static_cast<int>(lengths[image]);
    }
    tiles = (count + kTile - 1) / kTile;
  }
};

__device__ inline int warp() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ inline int warps() { return static_cast<int>(blockDim.x) / kWarp; }

// Starts to copy rows to shared memory. Padding rows and columns become zero.
template <typename T, int WIDTH>
__device__ void load_rows(T* to,          // [16 * tiles, WIDTH]
                          const T* from,  // [rows, ...], stride elements apart
                          int64_t stride,
                          const int64_t* token_index,  // [count] or null: all rows in order
                          int64_t rows, int width, const Tokens& tokens) {
  constexpr int kUnit = 16 / sizeof(T), kUnits = WIDTH / kUnit;
  for (int i = threadIdx.x; i < tokens.tiles * kTile * kUnits; i += blockDim.x) {
    const int row = i / kUnits, column = i % kUnits * kUnit;
    T* target = to + row * kStride<T, WIDTH> + column;
    const bool padding = row >= tokens.count || column >= width;
    const int64_t source = padding ? -1 : token_index == nullptr ? row : token_index[row];
    if (source >= 0 && source < rows) {
      copy_async_16(target, from + source * stride + column);
    } else {
      // All bits set is a NaN, so that a missing token can't pass for a real one.
      const unsigned bits = padding ? 0u : ~0u;
      *reinterpret_cast<uint4*>(target) = make_uint4(bits, bits, bits, bits);
    }
  }
}

__device__ inline float quad_sum(float value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}

__device__ inline float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 1));
  return fmaxf(value, __shfl_xor_sync(kAllLanes, value, 2));
}

// Column of element e of tile[n], counted from the first column of the tile.
__device__ inline int column_of(int n, int e) { return 8 * n + tile_column() + e % 2; }

// The greatest scores, times scale, of rows r and r + 8 of a tile of queries.
template <typename T, int WIDTH>
__device__ void row_maxima(float (&greatest)[2], const T* queries, const T* keys,
                           const Tokens& tokens, float scale) {
  greatest[0] = greatest[1] = -INFINITY;
  for (int tile = 0; tile < tokens.tiles; ++tile) {
    SquareTile scores;
    Tiles<T, WIDTH>::multiply_transposed(scores, queries, keys + tile * kTile * kStride<T, WIDTH>);
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (tile * kTile + column_of(n, e) >= tokens.count) continue;
        greatest[e / 2] = fmaxf(greatest[e / 2], scores[n][e] * scale);
      }
    }
  }
  greatest[0] = quad_max(greatest[0]);
  greatest[1] = quad_max(greatest[1]);
}

// scores := 2^(scale scores - offset of the row), and zero for keys beyond the valid tokens.
__device__ inline void exponentials(SquareTile& scores, const float (&offsets)[2], float scale,
                                    int first_key, int count) {
#pragma unroll
  for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const bool counts = first_key + column_of(n, e) < count;
      scores[n][e] = counts ? exp2f(scores[n][e] * scale - offsets[e / 2]) : 0.0f;
    }
  }
}

constexpr float kLog2E = 1.4426950408889634f;

// Calls launcher with the smallest compiled width that is at least `width`, as a type.
template <typename F>
cudaError_t with_width(int64_t width, F launcher) {
  if (width <= 0 || width % 8 != 0) return cudaErrorInvalidValue;
  if (width <= 32) return launcher(std::integral_constant<int, 32>{});
  if (width <= 64) return launcher(std::integral_constant<int, 64>{});
  if (width <= 80) return launcher(std::integral_constant<int, 80>{});
  if (width <= kMaxWidth) return launcher(std::integral_constant<int, kMaxWidth>{});
  return cudaErrorInvalidValue;
}

// Bytes of shared memory for a tile of tokens: Q, K and V; backward also dO and two floats per row.
template <typename T, int WIDTH>
constexpr int64_t tile_bytes(bool backward) {
  const int64_t row = kStride<T, WIDTH> * int64_t{sizeof(T)};
  return kTile * (backward ? 4 * row + 2 * int64_t{sizeof(float)} : 3 * row);
}

// Lets a kernel have as much shared memory as a block of the current device can have. The kernel
// gets the limit once per device, and always the same one: a limit that followed the size of each
// call would fail the larger of two calls that threads make at once.
template <auto KERNEL>
cudaError_t allow_shared_memory() {
  static std::atomic<uint64_t> allowed{0};  // bit i stands for device i
  int device = 0, bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (allowed & bit) return cudaSuccess;
  error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) allowed |= bit;
  return error;
}

// Launches one block per (image, head). It has the fewest warps that take all tiles in as few
// rounds as kMaxWarps warps would.
template <typename T, int WIDTH, auto KERNEL, typename... A>
cudaError_t launch_attention(bool backward, const AttentionShape& shape, cudaStream_t stream,
                             A... arguments) {
  const cudaError_t error = allow_shared_memory<KERNEL>();
  if (error != cudaSuccess) return error;
  const int64_t tiles = divide_up(shape.tokens, kTile);
  const int64_t threads = kWarp * divide_up(tiles, divide_up(tiles, kMaxWarps));
  const int64_t bytes = tiles * tile_bytes<T, WIDTH>(backward);
  dim3 grid, block;
  grid.x = static_cast<unsigned>(shape.images * shape.heads);
  block.x = static_cast<unsigned>(threads);
  return launch(KERNEL, grid, block, bytes, stream, arguments...);
}

}  // namespace smi_fast
