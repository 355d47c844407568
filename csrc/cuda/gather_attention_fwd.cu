// Attention among selected rows of qkv; specified by gather_attention in reference.py.
#include "gather_attention.cuh"

namespace smi_fast {
namespace {

// A warp takes tiles of 16 queries and goes over all keys twice: for the greatest score of each
// row, then for softmax and its GEMM with V. Without the launch bound of one block per
// multiprocessor, ptxas spills registers on sm_100 to reach an occupancy that shared memory
// forbids.
template <typename T, int WIDTH>
__global__ void __launch_bounds__(kWarp* kMaxWarps, 1)
    _gather_attention_fwd(const T* __restrict__ qkv,                // [B, N, 3, H, D]
                          const int64_t* __restrict__ token_index,  // [B, K] or null
                          const int64_t* __restrict__ lengths,      // [B] or null
                          T* __restrict__ out,                      // [B, K, H*D]
                          float* __restrict__ head_importance,      // [B, H, K] or null
                          AttentionShape shape) {
  constexpr int kTileSize = kTile * kStride<T, WIDTH>;
  const Tokens tokens(lengths, shape);
  const int width = static_cast<int>(shape.width);
  const int64_t part = shape.heads * shape.width;
  T* queries = reinterpret_cast<T*>(dynamic_shared());
  T* keys = queries + tokens.tiles * kTileSize;
  T* values = keys + tokens.tiles * kTileSize;
  const T* source = qkv + tokens.image * shape.rows * 3 * part + tokens.head * shape.width;
  const int64_t* rows =
      token_index == nullptr ? nullptr : token_index + tokens.image * shape.tokens;
  load_rows<T, WIDTH>(queries, source, 3 * part, rows, shape.rows, width, tokens);
  load_rows<T, WIDTH>(keys, source + part, 3 * part, rows, shape.rows, width, tokens);
  load_rows<T, WIDTH>(values, source + 2 * part, 3 * part, rows, shape.rows, width, tokens);
  wait_for_copies();
  __syncthreads();

  const float scale = tokens.scale * kLog2E;
  T* target = out + tokens.image * shape.tokens * part + tokens.head * shape.width;
  for (int tile = warp(); tile < tokens.tiles; tile += warps()) {
    const T* own = queries + tile * kTileSize;
    float greatest[2], sums[2] = {};
    row_maxima<T, WIDTH>(greatest, own, keys, tokens, scale);
    typename Tiles<T, WIDTH>::Wide result = {};
    for (int other = 0; other < tokens.tiles; ++other) {
      SquareTile weights;
      Tiles<T, WIDTH>::multiply_transposed(weights, own, keys + other * kTileSize);
      exponentials(weights, greatest, scale, other * kTile, tokens.count);
      for (const auto& w : weights) {
        sums[0] += w[0] + w[1];
        sums[1] += w[2] + w[3];
      }
      Tiles<T, WIDTH>::add_product(result, weights, values + other * kTileSize);
    }
    const float inverse[2] = {1.0f / quad_sum(sums[0]), 1.0f / quad_sum(sums[1])};
    Tiles<T, WIDTH>::store(result, inverse, width, [&](int row) -> T* {
      const int token = tile * kTile + row;
      return token < tokens.count ? target + token * part : nullptr;
    });
    if (tile > 0 || head_importance == nullptr) continue;
    // The first token is row 0 of the first tile, which lanes 0 to 3 hold.
    float* importance = head_importance + blockIdx.x * shape.tokens;
    for (int other = 0; other < tokens.tiles; ++other) {
      SquareTile weights;
      Tiles<T, WIDTH>::multiply_transposed(weights, own, keys + other * kTileSize);
      exponentials(weights, greatest, scale, other * kTile, tokens.count);
      for (int i = 0; i < 4 && tile_row() == 0; ++i) {
        const int token = other * kTile + column_of(i / 2, i % 2);
        if (token < tokens.count) importance[token] = weights[i / 2][i % 2] * inverse[0];
      }
    }
  }
}

// Sums in the order of the heads, so that results are reproducible.
template <typename T>
__global__ void _mean_over_heads(const float* __restrict__ head_importance,  // [B, H, K]
                                 const int64_t* __restrict__ lengths,        // [B] or null
                                 T* __restrict__ importance,                 // [B, K]
                                 AttentionShape shape) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= shape.images * shape.tokens) return;
  const int64_t image = i / shape.tokens, token = i % shape.tokens;
  float sum = 0.0f;
  if (lengths == nullptr || token < lengths[image]) {
    for (int64_t head = 0; head < shape.heads; ++head) {
      sum += head_importance[(image * shape.heads + head) * shape.tokens + token];
    }
  }
  importance[i] = from_float<T>(sum / static_cast<float>(shape.heads));
}

}  // namespace

cudaError_t launch_gather_attention_fwd(Type type, const void* qkv, const int64_t* token_index,
                                        const int64_t* lengths, void* out, float* head_importance,
                                        void* importance, AttentionShape shape,
                                        cudaStream_t stream) {
  const int64_t elements = shape.images * shape.tokens * shape.heads * shape.width;
  if (elements == 0) return cudaSuccess;
  if (lengths != nullptr) {
    const cudaError_t error = cudaMemsetAsync(out, 0, elements * bytes_of(type), stream);
    if (error != cudaSuccess) return error;
  }
  if (importance == nullptr) head_importance = nullptr;
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    const cudaError_t error = with_width(shape.width, [&](auto width) {
      return launch_attention<T, width, _gather_attention_fwd<T, width>>(
          false, shape, stream, static_cast<const T*>(qkv), token_index, lengths,
          static_cast<T*>(out), head_importance, shape);
    });
    if (error != cudaSuccess || importance == nullptr) return error;
    dim3 grid, block;
    block.x = 256;
    grid.x = static_cast<unsigned>(divide_up(shape.images * shape.tokens, block.x));
    return launch(_mean_over_heads<T>, grid, block, 0, stream, head_importance, lengths,
                  static_cast<T*>(importance), shape);
  });
}

cudaError_t max_tokens(Type type, int64_t width, bool backward, int64_t* tokens) {
  int device = 0, bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  return with_type(type, [&](auto element) {
    return with_width(width, [&](auto padded) {
      *tokens = bytes / tile_bytes<decltype(element), padded>(backward) * kTile;
      return cudaSuccess;
    });
  });
}

}  // namespace smi_fast
