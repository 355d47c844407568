// Gradient of attention among selected rows of qkv; specified by gather_attention_backward in
// reference.py.
#include "gather_attention.cuh"

namespace smi_fast {
namespace {

// Computes P again from the scores. A warp first takes tiles of 16 queries: it writes their dQ and
// keeps the softmax statistics of their rows in shared memory. Then it takes tiles of 16 keys and
// writes their dK and dV. Each row is written only by the warp that owns it.
template <typename T, int WIDTH>
__global__ void __launch_bounds__(kWarp* kMaxWarps)
    _gather_attention_bwd(const T* __restrict__ grad,               // [B, K, H*D]
                          const T* __restrict__ qkv,                // [B, N, 3, H, D]
                          const int64_t* __restrict__ token_index,  // [B, K] or null
                          const int64_t* __restrict__ lengths,      // [B] or null
                          T* __restrict__ grad_qkv,                 // [B, N, 3, H, D]
                          AttentionShape shape) {
  using Wide = typename Tiles<T, WIDTH>::Wide;
  constexpr int kTileSize = kTile * kStride<T, WIDTH>;
  const Tokens tokens(lengths, shape);
  const int width = static_cast<int>(shape.width);
  const int64_t part = shape.heads * shape.width;
  T* queries = reinterpret_cast<T*>(dynamic_shared());
  T* keys = queries + tokens.tiles * kTileSize;
  T* values = keys + tokens.tiles * kTileSize;
  T* grads = values + tokens.tiles * kTileSize;
  float* log_sums = reinterpret_cast<float*>(grads + tokens.tiles * kTileSize);  // [16 * tiles]
  float* means = log_sums + tokens.tiles * kTile;                                // [16 * tiles]
  const int64_t first = tokens.image * shape.rows * 3 * part + tokens.head * shape.width;
  const int64_t* rows =
      token_index == nullptr ? nullptr : token_index + tokens.image * shape.tokens;
  const T* grad_rows = grad + tokens.image * shape.tokens * part + tokens.head * shape.width;
  load_rows<T, WIDTH>(queries, qkv + first, 3 * part, rows, shape.rows, width, tokens);
  load_rows<T, WIDTH>(keys, qkv + first + part, 3 * part, rows, shape.rows, width, tokens);
  load_rows<T, WIDTH>(values, qkv + first + 2 * part, 3 * part, rows, shape.rows, width, tokens);
  load_rows<T, WIDTH>(grads, grad_rows, part, nullptr, shape.tokens, width, tokens);
  wait_for_copies();
  __syncthreads();

  const float scale = tokens.scale * kLog2E;
  // Address of the gradient of a token's q, k or v (i = 0, 1 or 2), or null if it has none.
  const auto target = [&](int token, int i) -> T* {
    if (token >= tokens.count) return nullptr;
    const int64_t row = rows == nullptr ? token : rows[token];
    return row < 0 || row >= shape.rows ? nullptr : grad_qkv + first + (3 * row + i) * part;
  };

  for (int tile = warp(); tile < tokens.tiles; tile += warps()) {
    const T *own = queries + tile * kTileSize, *own_grads = grads + tile * kTileSize;
    float greatest[2], sums[2] = {}, weighted[2] = {};
    row_maxima<T, WIDTH>(greatest, own, keys, tokens, scale);
    for (int other = 0; other < tokens.tiles; ++other) {
      SquareTile weights, d_probabilities;
      Tiles<T, WIDTH>::multiply_transposed(weights, own, keys + other * kTileSize);
      exponentials(weights, greatest, scale, other * kTile, tokens.count);
      // dP = dO Vᵀ
      Tiles<T, WIDTH>::multiply_transposed(d_probabilities, own_grads, values + other * kTileSize);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        sums[i % 4 / 2] += weights[i / 4][i % 4];
        weighted[i % 4 / 2] += weights[i / 4][i % 4] * d_probabilities[i / 4][i % 4];
      }
    }
    // log2 of the sum of exponentials of each row, and rowsum(P ∘ dP).
    float log_sum[2], mean[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(sums[half]);
      log_sum[half] = greatest[half] + log2f(sum);
      mean[half] = quad_sum(weighted[half]) / sum;
      const int row = tile * kTile + tile_row() + 8 * half;
      if (tile_column() != 0) continue;
      // 2^-inf = 0, so that padding rows get probabilities of zero.
      log_sums[row] = row < tokens.count ? log_sum[half] : INFINITY;
      means[row] = row < tokens.count ? mean[half] : 0.0f;
    }
    Wide d_queries = {};
    for (int other = 0; other < tokens.tiles; ++other) {
      SquareTile d_scores, d_probabilities;
      Tiles<T, WIDTH>::multiply_transposed(d_scores, own, keys + other * kTileSize);
      exponentials(d_scores, log_sum, scale, other * kTile, tokens.count);
      Tiles<T, WIDTH>::multiply_transposed(d_probabilities, own_grads, values + other * kTileSize);
      // dS = P ∘ (dP - rowsum(P ∘ dP))
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        d_scores[i / 4][i % 4] *= d_probabilities[i / 4][i % 4] - mean[i % 4 / 2];
      }
      // dQ = dS K / sqrt(D)
      Tiles<T, WIDTH>::add_product(d_queries, d_scores, keys + other * kTileSize);
    }
    Tiles<T, WIDTH>::store(d_queries, {tokens.scale, tokens.scale}, width,
                           [&](int row) { return target(tile * kTile + row, 0); });
  }
  __syncthreads();

  for (int tile = warp(); tile < tokens.tiles; tile += warps()) {
    const T *own_keys = keys + tile * kTileSize, *own_values = values + tile * kTileSize;
    Wide d_keys = {}, d_values = {};
    for (int other = 0; other < tokens.tiles; ++other) {
      // These tiles are transposed: a row is a key, a column is a query.
      SquareTile probabilities, d_scores;
      Tiles<T, WIDTH>::multiply_transposed(probabilities, own_keys, queries + other * kTileSize);
      Tiles<T, WIDTH>::multiply_transposed(d_scores, own_values, grads + other * kTileSize);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int query = other * kTile + column_of(i / 4, i % 4);
        float& probability = probabilities[i / 4][i % 4];
        probability = exp2f(probability * scale - log_sums[query]);
        d_scores[i / 4][i % 4] = probability * (d_scores[i / 4][i % 4] - means[query]);
      }
      // dV = Pᵀ dO, dK = dSᵀ Q / sqrt(D)
      Tiles<T, WIDTH>::add_product(d_values, probabilities, grads + other * kTileSize);
      Tiles<T, WIDTH>::add_product(d_keys, d_scores, queries + other * kTileSize);
    }
    Tiles<T, WIDTH>::store(d_keys, {tokens.scale, tokens.scale}, width,
                           [&](int row) { return target(tile * kTile + row, 1); });
    Tiles<T, WIDTH>::store(d_values, {1.0f, 1.0f}, width,
                           [&](int row) { return target(tile * kTile + row, 2); });
  }
}

}  // namespace

cudaError_t launch_gather_attention_bwd(Type type, const void* grad, const void* qkv,
                                        const int64_t* token_index, const int64_t* lengths,
                                        void* grad_qkv, AttentionShape shape, cudaStream_t stream) {
  const int64_t elements = shape.images * shape.rows * 3 * shape.heads * shape.width;
  if (elements == 0) return cudaSuccess;
  if (token_index != nullptr || lengths != nullptr) {
    const cudaError_t error = cudaMemsetAsync(grad_qkv, 0, elements * bytes_of(type), stream);
    if (error != cudaSuccess) return error;
  }
  if (shape.tokens == 0) return cudaSuccess;
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    return with_width(shape.width, [&](auto width) {
      return launch_attention<T, width, _gather_attention_bwd<T, width>>(
          true, shape, stream, static_cast<const T*>(grad), static_cast<const T*>(qkv), token_index,
          lengths, static_cast<T*>(grad_qkv), shape);
    });
  });
}

}  // namespace smi_fast
