// Attention of one (image, head) and its gradient; see gather_attention.cpp.
//
// Probabilities are held transposed, pᵀ[j, i] with the queries i across vector lanes: softmax then
// needs no sum across lanes, each product below is a scalar times a row, and queries that only fill
// up a vector are columns that nothing reads. Queries come in blocks, so that pᵀ stays in cache
// however long the sequence is.

#include "exp_kernel.h"
#include "small_matmul_kernel.h"

constexpr int64_t kBlock = 48;  // queries: three vectors, or a multiple, of every instruction set

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

// to [width, kBlock] = (the rows of `from` that `index` names, or all of them in order, + bias) ·
// scale, transposed, zeros beyond `count` of them; `copy` [count, width], unless null, gets them
// before the scale.
template <typename T>
void transpose(const Rows<const T>& from, const int64_t* index, int64_t count, int64_t width,
               const T* bias, T scale, T* to, T* copy) {
  using V = Vec<T>;
  for (int64_t r = 0; r < count; r += lanes<T>()) {
    const int64_t rows = std::min(lanes<T>(), count - r);
    for (int64_t c = 0; c < width; c += lanes<T>()) {
      const V offset = bias ? load<V>(bias + c) : V{};
      V square[lanes<T>()]{};
      for (int64_t i = 0; i < rows; ++i) {
        const V biased = load<V>(from[index ? index[r + i] : r + i] + c) + offset;
        if (copy) store(copy + (r + i) * width + c, biased);
        square[i] = biased * scale;
      }
      transpose_square<T>(square);
      for (int i = 0; i < lanes<T>(); ++i) store(to + (c + i) * kBlock + r, square[i]);
    }
  }
}

// Softmax over the keys of so many vectors of columns of pᵀ [keys, kBlock], in place. Together,
// since each of their maxima and sums has to wait for the one before.
template <typename T, int kVecs>
inline void softmax_columns(T* p, int64_t keys) {
  using V = Vec<T>;
  V highest[kVecs], sum[kVecs];
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v) {
    highest[v] = load<V>(p + v * lanes<T>());
    sum[v] = V{};
  }
  for (int64_t j = 1; j < keys; ++j) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      const V score = load<V>(p + j * kBlock + v * lanes<T>());
      highest[v] = score > highest[v] ? score : highest[v];
    }
  }
  for (int64_t j = 0; j < keys; ++j) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      T* at = p + j * kBlock + v * lanes<T>();
      const V weight = exp_of_negative<T>(load<V>(at) - highest[v]);
      store(at, weight);
      sum[v] += weight;
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v) sum[v] = T{1} / sum[v];
  for (int64_t j = 0; j < keys; ++j) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      T* at = p + j * kBlock + v * lanes<T>();
      store(at, load<V>(at) * sum[v]);
    }
  }
}

template <typename T>
void softmax(T* p, int64_t keys, int64_t columns) {
  int64_t i = 0;
  for (; i + 2 * lanes<T>() < columns; i += 3 * lanes<T>()) softmax_columns<T, 3>(p + i, keys);
  for (; i < columns; i += lanes<T>()) softmax_columns<T, 1>(p + i, keys);
}

// d_p = scale · p ∘ (d_p − Σ_j p ∘ d_p), the gradient of the scores before softmax and scale.
template <typename T>
void softmax_backward(const T* p, T* d_p, int64_t keys, int64_t columns, T scale) {
  using V = Vec<T>;
  for (int64_t i = 0; i < columns; i += lanes<T>()) {
    V sum{};
    for (int64_t j = 0; j < keys; ++j) {
      sum += load<V>(p + j * kBlock + i) * load<V>(d_p + j * kBlock + i);
    }
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t at = j * kBlock + i;
      store(d_p + at, load<V>(p + at) * ((load<V>(d_p + at) - sum) * scale));
    }
  }
}

// The working memory of one task, carved out of a buffer of vectors.
template <typename T>
struct Workspace {
  int64_t width;               // whole vectors
  T *k, *v, *d_k, *d_v;        // [length, width]
  T *q, *q_t, *d_q, *d_out_t;  // [kBlock, width], or transposed
  T *p, *d_p;                  // [length, kBlock]

  Workspace(const Head<T>& head, T* buffer) : width(round_up(head.width, lanes<T>())) {
    for (T** rows : {&k, &v, &d_k, &d_v}) {
      *rows = std::exchange(buffer, buffer + head.length * width);
    }
    for (T** rows : {&q, &q_t, &d_q, &d_out_t}) {
      *rows = std::exchange(buffer, buffer + kBlock * width);
    }
    for (T** rows : {&p, &d_p}) *rows = std::exchange(buffer, buffer + head.length * kBlock);
  }
};

// The rows of q, k or v, parts 0, 1 and 2, in qkv or its gradient, whether kept or not.
template <typename T, typename Element>
Rows<Element> part_of(const Head<T>& head, int64_t part, Element* qkv) {
  return {qkv + part * head.part, head.row};
}

template <typename V, typename T>
inline void copy_vectors(const T* from, int64_t width, T* to) {
  for (int64_t c = 0; c < width; c += lanes<T>()) store(to + c, load<V>(from + c));
}

// The kept rows of k or v, next to each other: in `to` [length, width], unless they are already.
template <typename T>
Rows<const T> gather(const Head<T>& head, int64_t part, int64_t width, T* to) {
  if (head.row == width && !head.kept) return part_of(head, part, head.qkv);
  for (int64_t i = 0; i < head.length; ++i) {
    copy_vectors<Vec<T>>(head.qkv + head.offset(part, i), width, to + i * width);
  }
  return {to, width};
}

// The same, but left where they are if every row is kept.
template <typename T>
Rows<const T> rows_of(const Head<T>& head, int64_t part, int64_t width, T* to) {
  return head.kept ? gather(head, part, width, to) : part_of(head, part, head.qkv);
}

// The kept rows of a part of d_qkv from `begin` on = from [count, width].
template <typename T>
void scatter(const Head<T>& head, int64_t part, int64_t begin, int64_t count, int64_t width,
             const T* from, T* d_qkv) {
  for (int64_t i = 0; i < count; ++i) {
    copy_vectors<Vec<T>>(from + i * width, width, d_qkv + head.offset(part, begin + i));
  }
}

// pᵀ [keys, kBlock] of the queries from `begin` on, which are left in `q` unless it is null.
template <typename T>
void probabilities(const Head<T>& head, const Rows<const T>& k, int64_t begin, int64_t queries,
                   const Workspace<T>& w, T* q) {
  const Rows<const T> rows = part_of(head, 0, head.qkv).tail(head.kept ? 0 : begin, 0);
  transpose(rows, head.kept ? head.kept + begin : nullptr, queries, w.width, head.q_bias,
            head.scale, w.q_t, q);
  multiply<T>({k.data, k.stride, 1}, {w.q_t, kBlock}, {w.p, kBlock}, head.length, queries,
              head.width);
  softmax(w.p, head.length, queries);
}

// attend() of rows that are whole vectors, as attend_backward_whole() is of attend_backward().
template <typename T>
void attend_whole(const Head<T>& head, T* buffer, T* out, T* importance) {
  const Workspace<T> w(head, buffer);
  const Rows<const T> k = rows_of(head, 1, w.width, w.k), v = gather(head, 2, w.width, w.v);
  for (int64_t begin = 0; begin < head.length; begin += kBlock) {
    const int64_t queries = std::min(kBlock, head.length - begin);
    probabilities<T>(head, k, begin, queries, w, nullptr);
    if (importance && begin == 0) {
      for (int64_t j = 0; j < head.length; ++j) importance[j] = w.p[j * kBlock];
    }
    multiply<T>({w.p, 1, kBlock}, v, {out + begin * head.out_row, head.out_row}, queries, w.width,
                head.length);
  }
}

// dV = Pᵀ dO, dP = dO Vᵀ, dS = P ∘ (dP − rowsum(P ∘ dP)) / √D, dQ = dS K, dK = dSᵀ Q.
template <typename T>
void attend_backward_whole(const Head<T>& head, T* buffer, const T* d_out, T* d_qkv) {
  const Workspace<T> w(head, buffer);
  const Rows<const T> k = gather(head, 1, w.width, w.k), v = rows_of(head, 2, w.width, w.v);
  for (int64_t begin = 0; begin < head.length; begin += kBlock) {
    const int64_t queries = std::min(kBlock, head.length - begin);
    probabilities(head, k, begin, queries, w, w.q);
    const Rows<const T> d_rows{d_out + begin * head.out_row, head.out_row};
    transpose<T>(d_rows, nullptr, queries, w.width, nullptr, 1, w.d_out_t, nullptr);
    multiply<T>({v.data, v.stride, 1}, {w.d_out_t, kBlock}, {w.d_p, kBlock}, head.length, queries,
                head.width);
    softmax_backward(w.p, w.d_p, head.length, queries, head.scale);
    // Sums over blocks stay together until the last one, where they can go straight to their rows.
    const bool ends = begin + queries == head.length && !head.kept;
    const Rows<T> d_k{w.d_k, w.width}, d_v{w.d_v, w.width};
    multiply<T>({w.p, kBlock, 1}, d_rows, ends ? part_of(head, 2, d_qkv) : d_v, head.length,
                w.width, queries, {begin ? w.d_v : nullptr, w.width});
    multiply<T>({w.d_p, kBlock, 1}, {w.q, w.width}, ends ? part_of(head, 1, d_qkv) : d_k,
                head.length, w.width, queries, {begin ? w.d_k : nullptr, w.width});
    const Rows<T> d_q =
        head.kept ? Rows<T>{w.d_q, w.width} : part_of(head, 0, d_qkv).tail(begin, 0);
    multiply<T>({w.d_p, 1, kBlock}, k, d_q, queries, w.width, head.length);
    if (head.kept) scatter(head, 0, begin, queries, w.width, w.d_q, d_qkv);
  }
  if (head.kept) {
    scatter(head, 1, 0, head.length, w.width, w.d_k, d_qkv);
    scatter(head, 2, 0, head.length, w.width, w.d_v, d_qkv);
  }
}

// A head whose rows are no whole vectors, copied into rows that are: q_bias, q, k and v, room for
// their gradients and for out or its own; then the working memory.
template <typename T>
struct PaddedHead {
  Head<T> head;
  T *out, *d_qkv, *buffer;

  PaddedHead(const Head<T>& from, T* memory) : head(from) {
    const int64_t width = round_up(from.width, lanes<T>()), part = from.length * width;
    T* qkv = memory + width;
    d_qkv = qkv + 3 * part;
    out = d_qkv + 3 * part;
    buffer = out + part;
    for (int64_t i = 0; i < 3 * from.length; ++i) {
      std::copy_n(from.qkv + from.offset(i / from.length, i % from.length), from.width,
                  qkv + i * width);
    }
    if (from.q_bias) head.q_bias = std::copy_n(from.q_bias, from.width, memory) - from.width;
    head.qkv = qkv;
    head.kept = nullptr;
    head.row = head.out_row = width;
    head.part = part;
  }
};

template <typename T>
int64_t workspace_size(int64_t length, int64_t head_width) {
  const int64_t width = round_up(head_width, lanes<T>());
  const int64_t padded = head_width == width ? 0 : (7 * length + 1) * width;
  return padded + 4 * (length + kBlock) * width + 2 * length * kBlock;
}

template <typename T>
void attend(const Head<T>& head, T* buffer, T* out, T* importance) {
  if (head.width % lanes<T>() == 0) return attend_whole(head, buffer, out, importance);
  const PaddedHead<T> own(head, buffer);
  attend_whole(own.head, own.buffer, own.out, importance);
  for (int64_t i = 0; i < head.length; ++i) {
    std::copy_n(own.out + i * own.head.out_row, head.width, out + i * head.out_row);
  }
}

template <typename T>
void attend_backward(const Head<T>& head, T* buffer, const T* d_out, T* d_qkv) {
  if (head.width % lanes<T>() == 0) return attend_backward_whole(head, buffer, d_out, d_qkv);
  const PaddedHead<T> own(head, buffer);
  for (int64_t i = 0; i < head.length; ++i) {
    std::copy_n(d_out + i * head.out_row, head.width, own.out + i * own.head.out_row);
  }
  attend_backward_whole(own.head, own.buffer, own.out, own.d_qkv);
  for (int64_t part = 0; part < 3; ++part) {
    for (int64_t i = 0; i < head.length; ++i) {
      std::copy_n(own.d_qkv + own.head.offset(part, i), head.width, d_qkv + head.offset(part, i));
    }
  }
}
