// GEMMs of tiles of 16 rows by one warp: tensor cores for 16-bit elements, FMA for float.
//
// For every type, a result is spread over the lanes like d of multiply_add. In lane 4 r + q,
// - elements 0 and 1 of tile[n] are row r, columns 8 n + 2 q and 8 n + 2 q + 1;
// - elements 2 and 3 are the same columns of row r + 8.
#pragma once

#include "common.cuh"
#include "ptx.cuh"

namespace smi_fast {

constexpr int kTile = 16;

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int tile_row() { return lane() / 4; }
__device__ inline int tile_column() { return lane() % 4 * 2; }

// Elements from one row of WIDTH elements to the next in shared memory. This is an odd number of
// 16-byte units, so that the units of eight neighbouring rows lie in different banks.
template <typename T, int WIDTH>
constexpr int kStride = WIDTH + 16 / static_cast<int>(sizeof(T));

using SquareTile = float[kTile / 8][4];

template <typename T, int WIDTH>
struct Tiles {
  using Wide = float[WIDTH / 8][4];
  static constexpr int kRow = kStride<T, WIDTH>;

  // product = a bᵀ
  static __device__ void multiply_transposed(SquareTile& product, const T* a,  // [16, WIDTH]
                                             const T* b) {                     // [16, WIDTH]
    const T* a_row = a + lane() % 16 * kRow + lane() / 16 * 8;
    const T* b_row = b + (lane() / 16 * 8 + lane() % 8) * kRow + lane() / 8 % 2 * 8;
    for (auto& part : product) part[0] = part[1] = part[2] = part[3] = 0.0f;
#pragma unroll
    for (int k = 0; k < WIDTH; k += 16) {
      unsigned left[4], right[4];
      load_matrices(left, a_row + k);
      load_matrices(right, b_row + k);
      multiply_add<T>(product[0], left, right[0], right[1]);
      multiply_add<T>(product[1], left, right[2], right[3]);
    }
  }

  // sum += a b. The result `a`, rounded to T, already has the layout of a left operand.
  static __device__ void add_product(Wide& sum, const SquareTile& a, const T* b) {  // [16, WIDTH]
    const unsigned left[4] = {pack<T>(a[0][0], a[0][1]), pack<T>(a[0][2], a[0][3]),
                              pack<T>(a[1][0], a[1][1]), pack<T>(a[1][2], a[1][3])};
    const T* b_row = b + lane() % 16 * kRow + lane() / 16 * 8;
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n += 2) {
      unsigned right[4];
      load_matrices_transposed(right, b_row + 8 * n);
      multiply_add<T>(sum[n], left, right[0], right[1]);
      multiply_add<T>(sum[n + 1], left, right[2], right[3]);
    }
  }

  // Stores row r, times its factor, to row_at(r). A row whose address is null is left out.
  template <typename F>
  static __device__ void store(const Wide& tile, const float (&factors)[2], int width, F row_at) {
    const bool odd = lane() % 2 != 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      T* row = row_at(tile_row() + 8 * half);
      const float factor = factors[half];
#pragma unroll
      for (int n = 0; n < WIDTH / 8; n += 2) {
        const float (&even)[4] = tile[n], (&next)[4] = tile[n + 1];
        const unsigned low = pack<T>(even[2 * half] * factor, even[2 * half + 1] * factor);
        const unsigned high = pack<T>(next[2 * half] * factor, next[2 * half + 1] * factor);
        // Neighbouring lanes swap pairs, so that each lane stores four consecutive elements.
        const unsigned other = __shfl_xor_sync(kAllLanes, odd ? low : high, 1);
        const int column = 8 * (n + odd) + lane() % 4 / 2 * 4;
        if (row == nullptr || column >= width) continue;
        *reinterpret_cast<uint2*>(row + column) = odd ? uint2{other, high} : uint2{low, other};
      }
    }
  }
};

template <int WIDTH>
struct Tiles<float, WIDTH> {
  using Wide = float[WIDTH / 8][4];
  static constexpr int kRow = kStride<float, WIDTH>;

  static __device__ float dot(float4 a, float4 b) {
    return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
  }

  static __device__ float4 four(const float* at) { return *reinterpret_cast<const float4*>(at); }

  static __device__ void multiply_transposed(SquareTile& product, const float* a,  // [16, WIDTH]
                                             const float* b) {                     // [16, WIDTH]
    const float* a_row = a + tile_row() * kRow;
    const float* b_row = b + tile_column() * kRow;
    for (auto& part : product) part[0] = part[1] = part[2] = part[3] = 0.0f;
#pragma unroll 4
    for (int k = 0; k < WIDTH; k += 4) {
      const float4 upper = four(a_row + k), lower = four(a_row + 8 * kRow + k);
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
        for (int next = 0; next < 2; ++next) {
          const float4 right = four(b_row + (8 * n + next) * kRow + k);
          product[n][next] += dot(upper, right);
          product[n][2 + next] += dot(lower, right);
        }
      }
    }
  }

  static __device__ void add_product(Wide& sum, const SquareTile& a,
                                     const float* b) {  // [16, WIDTH]
    const int first_of_row = lane() / 4 * 4;
#pragma unroll
    for (int k = 0; k < kTile; ++k) {
      const int owner = first_of_row + k % 8 / 2;
      const float upper = __shfl_sync(kAllLanes, a[k / 8][k % 2], owner);
      const float lower = __shfl_sync(kAllLanes, a[k / 8][k % 2 + 2], owner);
#pragma unroll
      for (int n = 0; n < WIDTH / 8; ++n) {
        const float2 right = *reinterpret_cast<const float2*>(b + k * kRow + 8 * n + tile_column());
        sum[n][0] += upper * right.x;
        sum[n][1] += upper * right.y;
        sum[n][2] += lower * right.x;
        sum[n][3] += lower * right.y;
      }
    }
  }

  template <typename F>
  static __device__ void store(const Wide& tile, const float (&factors)[2], int width, F row_at) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* row = row_at(tile_row() + 8 * half);
      if (row == nullptr) continue;
#pragma unroll
      for (int n = 0; n < WIDTH / 8; ++n) {
        if (8 * n >= width) break;
        *reinterpret_cast<float2*>(row + 8 * n + tile_column()) =
            make_float2(tile[n][2 * half] * factors[half], tile[n][2 * half + 1] * factors[half]);
      }
    }
  }
};

}  // namespace smi_fast
