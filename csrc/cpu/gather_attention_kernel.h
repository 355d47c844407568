// Attention of one (image, head) and its gradient; see gather_attention.cpp.
//
// Probabilities are held transposed, pᵀ[j, i] with the queries i across vector lanes: softmax then
// needs no sum across lanes, each product below is a scalar times a row, and queries that only fill
// up a vector are columns that nothing reads. Queries come in blocks, so that pᵀ stays in cache
// however long the sequence is.

#include "exp_kernel.h"

// Tiles of sums that fit in registers beside the vectors they are made from, rows by vectors: 4 x
// 3, or with 32 registers 8 x 3 and 6 x 4, where a head 64 wide is one tile across.
constexpr int kTileVecs = kVectorRegisters == 32 ? 4 : 3;
constexpr int kMostTileRows = kVectorRegisters / 4;

constexpr int tile_rows(int vecs) { return vecs == 4 ? 6 : kMostTileRows; }
constexpr int64_t kBlock = 48;  // queries: whole tiles of every instruction set

// c[r, v] (+)= Σ_k a(r, k) b[k, v] for a tile of c that is held in registers.
template <typename T, int kVecs, int kTileRows = tile_rows(kVecs)>
void multiply_tile(const T* a, int64_t a_row, int64_t a_step, const T* b, T* c, int64_t width,
                   int64_t depth, bool accumulate) {
  using V = Vec<T>;
  // Unrolled by name, because sums that are indexed by a loop live in memory.
  V sums[kTileRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) sums[r][v] = V{};
  }
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += width) {
    V row[kVecs];
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) row[v] = load<V>(b + v * lanes<T>());
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 3
      for (int v = 0; v < kVecs; ++v) sums[r][v] += a[r * a_row] * row[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) {
      T* to = c + r * width + v * lanes<T>();
      store(to, accumulate ? load<V>(to) + sums[r][v] : sums[r][v]);
    }
  }
}

// A matrix read as a(r, k) = data[r·row + k·step].
template <typename T>
struct Factor {
  const T* data;
  int64_t row, step;
};

// c [rows, columns] (+)= a [rows, depth] · b [depth, columns], in whole tiles: up to a tile's rows
// and a vector's columns more are written. Rows of b and c are `width` apart.
template <typename T>
void multiply(const std::type_identity_t<Factor<T>>& a, const T* b, T* c, int64_t rows,
              int64_t columns, int64_t width, int64_t depth, bool accumulate = false) {
  const int64_t vecs = ceil_div(columns, lanes<T>());
  const int64_t panels = ceil_div(vecs, kTileVecs);
  int64_t done = 0;
  for (int64_t panel = 0; panel < panels; ++panel) {
    // Panels of nearly the same width: 4 vectors are 2 + 2, not 3 + 1.
    const int64_t count = ceil_div(vecs - done, panels - panel);
    const auto tile = count == kTileVecs ? multiply_tile<T, kTileVecs>
                      : count == 3       ? multiply_tile<T, 3>
                      : count == 2       ? multiply_tile<T, 2>
                                         : multiply_tile<T, 1>;
    const int64_t at = done * lanes<T>();
    for (int64_t r = 0; r < rows; r += tile_rows(count)) {
      tile(a.data + r * a.row, a.row, a.step, b + at, c + r * width + at, width, depth, accumulate);
    }
    done += count;
  }
}

template <typename V, typename T, int... kLane>
inline V pick(const V& a, const V& b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, kLane...);
#else
  return __builtin_shuffle(a, b, Vec<Bits<T>>{kLane...});
#endif
}

// Exchanges the off-diagonal blocks of side kSide between two rows of a square that far apart.
template <typename T, int kSide, int... kLane>
inline void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, kLane...>) {
  constexpr int kLanes = sizeof...(kLane);
  const Vec<T> above = pick<Vec<T>, T, (kLane & kSide ? kLane - kSide + kLanes : kLane)...>(a, b);
  b = pick<Vec<T>, T, (kLane & kSide ? kLane + kLanes : kLane + kSide)...>(a, b);
  a = above;
}

template <typename T, int kSide = lanes<T>() / 2>
inline void transpose_square(Vec<T>* rows) {
  for (int i = 0; i < lanes<T>(); ++i) {
    if (i & kSide) continue;
    exchange<T, kSide>(rows[i], rows[i + kSide], std::make_integer_sequence<int, lanes<T>()>{});
  }
  if constexpr (kSide > 1) transpose_square<T, kSide / 2>(rows);
}

// to [width, kBlock] = from [kBlock, width] transposed, as far as `count` rows need.
template <typename T>
void transpose(const T* from, T* to, int64_t count, int64_t width) {
  for (int64_t r = 0; r < count; r += lanes<T>()) {
    for (int64_t c = 0; c < width; c += lanes<T>()) {
      Vec<T> square[lanes<T>()];
      for (int i = 0; i < lanes<T>(); ++i) square[i] = load<Vec<T>>(from + (r + i) * width + c);
      transpose_square<T>(square);
      for (int i = 0; i < lanes<T>(); ++i) store(to + (c + i) * kBlock + r, square[i]);
    }
  }
}

// Softmax over the keys of pᵀ [keys, kBlock], in place.
template <typename T>
void softmax(T* p, int64_t keys, int64_t columns) {
  using V = Vec<T>;
  for (int64_t i = 0; i < columns; i += lanes<T>()) {
    V highest = load<V>(p + i);
    for (int64_t j = 1; j < keys; ++j) {
      const V score = load<V>(p + j * kBlock + i);
      highest = score > highest ? score : highest;
    }
    V sum{};
    for (int64_t j = 0; j < keys; ++j) {
      const V weight = exp_of_negative<T>(load<V>(p + j * kBlock + i) - highest);
      store(p + j * kBlock + i, weight);
      sum += weight;
    }
    const V share = T{1} / sum;
    for (int64_t j = 0; j < keys; ++j) {
      store(p + j * kBlock + i, load<V>(p + j * kBlock + i) * share);
    }
  }
}

// d_p = p ∘ (d_p − Σ_j p ∘ d_p), the gradient of the scores before softmax.
template <typename T>
void softmax_backward(const T* p, T* d_p, int64_t keys, int64_t columns) {
  using V = Vec<T>;
  for (int64_t i = 0; i < columns; i += lanes<T>()) {
    V sum{};
    for (int64_t j = 0; j < keys; ++j) {
      sum += load<V>(p + j * kBlock + i) * load<V>(d_p + j * kBlock + i);
    }
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t at = j * kBlock + i;
      store(d_p + at, load<V>(p + at) * (load<V>(d_p + at) - sum));
    }
  }
}

// Rows that whole tiles of any height reach at most.
constexpr int64_t padded(int64_t rows) { return rows + kMostTileRows; }

// The working memory of one task, carved out of a buffer of vectors.
template <typename T>
struct Workspace {
  int64_t width, keys;                 // whole vectors, whole tiles
  T *k, *v, *d_k, *d_v;                // [keys, width]
  T *q, *out, *d_out, *q_t, *d_out_t;  // [kBlock, width], and transposed
  T *p, *d_p;                          // [keys, kBlock]

  Workspace(const Head<T>& head, T* buffer)
      : width(round_up(head.width, lanes<T>())), keys(padded(head.length)) {
    for (T** rows : {&k, &v, &d_k, &d_v}) *rows = std::exchange(buffer, buffer + keys * width);
    for (T** rows : {&q, &out, &d_out, &q_t, &d_out_t}) {
      *rows = std::exchange(buffer, buffer + kBlock * width);
    }
    for (T** rows : {&p, &d_p}) *rows = std::exchange(buffer, buffer + keys * kBlock);
  }
};

template <typename T>
int64_t workspace_size(int64_t length, int64_t head_width) {
  const int64_t width = round_up(head_width, lanes<T>()), keys = padded(length);
  return 4 * keys * width + 5 * kBlock * width + 2 * keys * kBlock;
}

// to [length, width] = the rows of k or v, parts 1 and 2.
template <typename T>
void gather_rows(const Head<T>& head, int64_t part, int64_t width, T* to) {
  for (int64_t i = 0; i < head.length; ++i, to += width) {
    std::copy_n(head.qkv + head.offset(part, i), head.width, to);
  }
}

// to [count, width] = the rows of q from `begin` on, biased and scaled.
template <typename T>
void gather_queries(const Head<T>& head, int64_t begin, int64_t count, int64_t width,
                    T* __restrict to) {
  for (int64_t i = begin; i < begin + count; ++i, to += width) {
    const T* __restrict from = head.qkv + head.offset(0, i);
    if (head.q_bias) {
      for (int64_t d = 0; d < head.width; ++d) to[d] = (from[d] + head.q_bias[d]) * head.scale;
    } else {
      for (int64_t d = 0; d < head.width; ++d) to[d] = from[d] * head.scale;
    }
  }
}

// dqkv's rows = from [count, width], times a scale.
template <typename T>
void scatter_rows(const Head<T>& head, int64_t part, int64_t begin, int64_t count, T scale,
                  int64_t width, const T* __restrict from, T* __restrict d_qkv) {
  for (int64_t i = begin; i < begin + count; ++i, from += width) {
    T* to = d_qkv + head.offset(part, i);
    for (int64_t d = 0; d < head.width; ++d) to[d] = from[d] * scale;
  }
}

// pᵀ [keys, kBlock] of the queries from `begin` on, which stay in w.q, scaled.
template <typename T>
void probabilities(const Head<T>& head, int64_t begin, int64_t queries, const Workspace<T>& w) {
  gather_queries(head, begin, queries, w.width, w.q);
  transpose(w.q, w.q_t, queries, w.width);
  multiply({w.k, w.width, 1}, w.q_t, w.p, head.length, queries, kBlock, head.width);
  softmax(w.p, head.length, queries);
}

template <typename T>
void attend(const Head<T>& head, T* buffer, T* out, T* importance) {
  const Workspace<T> w(head, buffer);
  gather_rows(head, 1, w.width, w.k);
  gather_rows(head, 2, w.width, w.v);
  for (int64_t begin = 0; begin < head.length; begin += kBlock) {
    const int64_t queries = std::min(kBlock, head.length - begin);
    probabilities(head, begin, queries, w);
    if (importance && begin == 0) {
      for (int64_t j = 0; j < head.length; ++j) importance[j] = w.p[j * kBlock];
    }
    multiply({w.p, 1, kBlock}, w.v, w.out, queries, w.width, w.width, head.length);
    for (int64_t i = 0; i < queries; ++i) {
      std::copy_n(w.out + i * w.width, head.width, out + (begin + i) * head.out_row);
    }
  }
}

// dV = Pᵀ dO, dP = dO Vᵀ, dS = P ∘ (dP − rowsum(P ∘ dP)), dQ = dS K / √D, dK = dSᵀ Q / √D.
template <typename T>
void attend_backward(const Head<T>& head, T* buffer, const T* d_out, T* d_qkv) {
  const Workspace<T> w(head, buffer);
  gather_rows(head, 1, w.width, w.k);
  gather_rows(head, 2, w.width, w.v);
  for (int64_t begin = 0; begin < head.length; begin += kBlock) {
    const int64_t queries = std::min(kBlock, head.length - begin);
    probabilities(head, begin, queries, w);
    for (int64_t i = 0; i < queries; ++i) {
      std::copy_n(d_out + (begin + i) * head.out_row, head.width, w.d_out + i * w.width);
    }
    transpose(w.d_out, w.d_out_t, queries, w.width);
    multiply({w.v, w.width, 1}, w.d_out_t, w.d_p, head.length, queries, kBlock, head.width);
    softmax_backward(w.p, w.d_p, head.length, queries);
    multiply({w.p, kBlock, 1}, w.d_out, w.d_v, head.length, w.width, w.width, queries, begin > 0);
    multiply({w.d_p, kBlock, 1}, w.q, w.d_k, head.length, w.width, w.width, queries, begin > 0);
    multiply({w.d_p, 1, kBlock}, w.k, w.out, queries, w.width, w.width, head.length);
    scatter_rows(head, 0, begin, queries, head.scale, w.width, w.out, d_qkv);
  }
  scatter_rows(head, 1, 0, head.length, T{1}, w.width, w.d_k, d_qkv);
  scatter_rows(head, 2, 0, head.length, T{1}, w.width, w.d_v, d_qkv);
}
