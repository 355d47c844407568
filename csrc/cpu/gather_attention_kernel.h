// Attention of one (image, head) and its gradient; see gather_attention.cpp.
//
// Probabilities are stored transposed, as pᵀ[j, i] of key j and query i, with queries across vector
// lanes:
// - Softmax needs no sum across lanes.
// - Each GEMM below multiplies rows by scalars.
// - Queries that only fill up the last vector are columns that are never read.
// Queries are processed in blocks, so that pᵀ stays in cache for sequences of any length.

#include "exp_kernel.h"
#include "small_matmul_kernel.h"

constexpr int64_t kQueryBlock = 48;  // queries; a multiple of three vectors of each instruction set

template <typename V, typename T, int... kLane>
inline V pick(const V& a, const V& b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, kLane...);
#else
  return __builtin_shuffle(a, b, Vec<Bits<T>>{kLane...});
#endif
}

// Swaps the off-diagonal blocks of side kSide between rows i and i + kSide of a square.
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

// Writes ((rows + bias) · scale)ᵀ to `to` [width, kQueryBlock]. The `count` rows are those of
// `from` that `index` names, or the first ones if it is null. Columns that fill up the last vector
// become zero. Unless `copy` [count, width] is null, it gets rows + bias.
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
      for (int i = 0; i < lanes<T>(); ++i) store(to + (c + i) * kQueryBlock + r, square[i]);
    }
  }
}

// Softmax over the keys of kVecs vectors of columns of pᵀ [keys, kQueryBlock], in place. Each step
// of a running maximum or sum waits for the step before, so several vectors are interleaved.
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
      const V score = load<V>(p + j * kQueryBlock + v * lanes<T>());
      highest[v] = score > highest[v] ? score : highest[v];
    }
  }
  for (int64_t j = 0; j < keys; ++j) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      T* at = p + j * kQueryBlock + v * lanes<T>();
      const V exponential = exp_of_negative<T>(load<V>(at) - highest[v]);
      store(at, exponential);
      sum[v] += exponential;
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v) sum[v] = T{1} / sum[v];
  for (int64_t j = 0; j < keys; ++j) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      T* at = p + j * kQueryBlock + v * lanes<T>();
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

// d_p = scale · p ∘ (d_p − Σ_j p ∘ d_p), the gradient of the scores before scale and softmax.
template <typename T>
void softmax_backward(const T* p, T* d_p, int64_t keys, int64_t columns, T scale) {
  using V = Vec<T>;
  for (int64_t i = 0; i < columns; i += lanes<T>()) {
    V sum{};
    for (int64_t j = 0; j < keys; ++j) {
      sum += load<V>(p + j * kQueryBlock + i) * load<V>(d_p + j * kQueryBlock + i);
    }
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t at = j * kQueryBlock + i;
      store(d_p + at, load<V>(p + at) * ((load<V>(d_p + at) - sum) * scale));
    }
  }
}

// Scratch memory of one task, cut from one buffer.
template <typename T>
struct Workspace {
  int64_t width;               // of a head, rounded up to whole vectors
  T *k, *v, *d_k, *d_v;        // [length, width]
  T *q, *q_t, *d_q, *d_out_t;  // [kQueryBlock, width], or transposed
  T *p, *d_p;                  // [length, kQueryBlock]

  Workspace(const Head<T>& head, T* buffer) : width(round_up(head.width, lanes<T>())) {
    for (T** rows : {&k, &v, &d_k, &d_v}) {
      *rows = std::exchange(buffer, buffer + head.length * width);
    }
    for (T** rows : {&q, &q_t, &d_q, &d_out_t}) {
      *rows = std::exchange(buffer, buffer + kQueryBlock * width);
    }
    for (T** rows : {&p, &d_p}) *rows = std::exchange(buffer, buffer + head.length * kQueryBlock);
  }
};

// All rows of q, k or v (part 0, 1 or 2) in qkv or in its gradient.
template <typename T, typename Element>
Rows<Element> part_rows(const Head<T>& head, int64_t part, Element* qkv) {
  return {qkv + part * head.part_stride, head.row_stride};
}

template <typename V, typename T>
inline void copy_vectors(const T* from, int64_t width, T* to) {
  for (int64_t c = 0; c < width; c += lanes<T>()) store(to + c, load<V>(from + c));
}

// The selected rows of k or v, contiguous: copied to `to` [length, width] unless they already are.
template <typename T>
Rows<const T> gather(const Head<T>& head, int64_t part, int64_t width, T* to) {
  if (head.row_stride == width && !head.token_index) return part_rows(head, part, head.qkv);
  for (int64_t i = 0; i < head.length; ++i) {
    copy_vectors<Vec<T>>(head.qkv + head.offset(part, i), width, to + i * width);
  }
  return {to, width};
}

// The selected rows of k or v. They stay in qkv, with its stride, unless token_index selects them.
template <typename T>
Rows<const T> rows_of(const Head<T>& head, int64_t part, int64_t width, T* to) {
  return head.token_index ? gather(head, part, width, to) : part_rows(head, part, head.qkv);
}

// Copies `from` [count, width] to the selected rows of one part of d_qkv, from row `begin` on.
template <typename T>
void scatter(const Head<T>& head, int64_t part, int64_t begin, int64_t count, int64_t width,
             const T* from, T* d_qkv) {
  for (int64_t i = 0; i < count; ++i) {
    copy_vectors<Vec<T>>(from + i * width, width, d_qkv + head.offset(part, begin + i));
  }
}

// Writes pᵀ [keys, kQueryBlock] of the queries from `begin` on to w.p. Unless `q` is null, it gets
// these queries with their bias, not yet scaled.
template <typename T>
void probabilities(const Head<T>& head, const Rows<const T>& k, int64_t begin, int64_t queries,
                   const Workspace<T>& w, T* q) {
  const Rows<const T> rows = part_rows(head, 0, head.qkv).tail(head.token_index ? 0 : begin, 0);
  transpose(rows, head.token_index ? head.token_index + begin : nullptr, queries, w.width,
            head.q_bias, head.scale, w.q_t, q);
  matmul<T>({k.data, k.stride, 1}, {w.q_t, kQueryBlock}, {w.p, kQueryBlock}, head.length, queries,
            head.width);
  softmax(w.p, head.length, queries);
}

// attend() for a width that is a multiple of the vector length.
template <typename T>
void attend_whole(const Head<T>& head, T* buffer, T* out, T* importance) {
  const Workspace<T> w(head, buffer);
  const Rows<const T> k = rows_of(head, 1, w.width, w.k), v = gather(head, 2, w.width, w.v);
  for (int64_t begin = 0; begin < head.length; begin += kQueryBlock) {
    const int64_t queries = std::min(kQueryBlock, head.length - begin);
    probabilities<T>(head, k, begin, queries, w, nullptr);
    if (importance && begin == 0) {
      for (int64_t j = 0; j < head.length; ++j) importance[j] = w.p[j * kQueryBlock];
    }
    matmul<T>({w.p, 1, kQueryBlock}, v, {out + begin * head.out_stride, head.out_stride}, queries,
              w.width, head.length);
  }
}

// attend_backward() for a width that is a multiple of the vector length.
// dV = Pᵀ dO, dP = dO Vᵀ, dS = P ∘ (dP − rowsum(P ∘ dP)) / √D, dQ = dS K, dK = dSᵀ Q.
template <typename T>
void attend_backward_whole(const Head<T>& head, T* buffer, const T* d_out, T* d_qkv) {
  const Workspace<T> w(head, buffer);
  const Rows<const T> k = gather(head, 1, w.width, w.k), v = rows_of(head, 2, w.width, w.v);
  for (int64_t begin = 0; begin < head.length; begin += kQueryBlock) {
    const int64_t queries = std::min(kQueryBlock, head.length - begin);
    probabilities(head, k, begin, queries, w, w.q);
    const Rows<const T> d_rows{d_out + begin * head.out_stride, head.out_stride};
    transpose<T>(d_rows, nullptr, queries, w.width, nullptr, 1, w.d_out_t, nullptr);
    matmul<T>({v.data, v.stride, 1}, {w.d_out_t, kQueryBlock}, {w.d_p, kQueryBlock}, head.length,
              queries, head.width);
    softmax_backward(w.p, w.d_p, head.length, queries, head.scale);
    // dK and dV are summed in scratch memory. The last block writes the sums to d_qkv directly,
    // unless token_index scatters their rows.
    const bool ends = begin + queries == head.length && !head.token_index;
    const Rows<T> d_k{w.d_k, w.width}, d_v{w.d_v, w.width};
    matmul<T>({w.p, kQueryBlock, 1}, d_rows, ends ? part_rows(head, 2, d_qkv) : d_v, head.length,
              w.width, queries, {begin ? w.d_v : nullptr, w.width});
    matmul<T>({w.d_p, kQueryBlock, 1}, {w.q, w.width}, ends ? part_rows(head, 1, d_qkv) : d_k,
              head.length, w.width, queries, {begin ? w.d_k : nullptr, w.width});
    const Rows<T> d_q =
        head.token_index ? Rows<T>{w.d_q, w.width} : part_rows(head, 0, d_qkv).tail(begin, 0);
    matmul<T>({w.d_p, 1, kQueryBlock}, k, d_q, queries, w.width, head.length);
    if (head.token_index) scatter(head, 0, begin, queries, w.width, w.d_q, d_qkv);
  }
  if (head.token_index) {
    scatter(head, 1, 0, head.length, w.width, w.d_k, d_qkv);
    scatter(head, 2, 0, head.length, w.width, w.d_v, d_qkv);
  }
}

// Whether a head is computed where it lies: in the type that it is stored in, and in whole vectors.
template <typename S>
constexpr bool in_place(int64_t width) {
  return std::is_same_v<S, Computed<S>> && width % lanes<S>() == 0;
}

// A copy of a head in the type that it is computed in, with its width rounded up to whole vectors.
// `memory` holds q_bias, then q, k and v, then their gradients, then the output or its gradient.
// The rest of it is scratch memory.
template <typename T>
struct OwnHead {
  Head<T> head;
  T *out, *d_qkv, *buffer;

  template <typename S>
  OwnHead(const Head<S>& from, T* memory) {
    const int64_t width = round_up(from.width, lanes<T>()), part = from.length * width;
    T* qkv = memory + width;
    d_qkv = qkv + 3 * part;
    out = d_qkv + 3 * part;
    buffer = out + part;
    for (int64_t i = 0; i < 3 * from.length; ++i) {
      convert_n(from.qkv + from.offset(i / from.length, i % from.length), from.width,
                qkv + i * width);
    }
    if (from.q_bias) std::copy_n(from.q_bias, from.width, memory);
    head = {qkv,        from.q_bias ? memory : nullptr,
            nullptr,    from.length,
            from.width, width,
            part,       width,
            from.scale};
  }
};

// Elements of the buffer that attend() and attend_backward() need.
template <typename S>
int64_t workspace_size(int64_t length, int64_t head_width) {
  const int64_t width = round_up(head_width, lanes<Computed<S>>());
  const int64_t own = in_place<S>(head_width) ? 0 : (7 * length + 1) * width;
  return own + 4 * (length + kQueryBlock) * width + 2 * length * kQueryBlock;
}

// Writes out [length, D]. Unless `importance` [length] is null, it gets the probabilities of the
// first token.
template <typename S, typename T = Computed<S>>
void attend(const Head<S>& head, T* buffer, S* out, T* importance) {
  if constexpr (std::is_same_v<S, T>) {
    if (in_place<S>(head.width)) return attend_whole(head, buffer, out, importance);
  }
  const OwnHead<T> own(head, buffer);
  attend_whole(own.head, own.buffer, own.out, importance);
  for (int64_t i = 0; i < head.length; ++i) {
    convert_n(own.out + i * own.head.out_stride, head.width, out + i * head.out_stride);
  }
}

// Writes the gradients of the selected rows of q, k and v to d_qkv, given d_out [length, D].
template <typename S, typename T = Computed<S>>
void attend_backward(const Head<S>& head, T* buffer, const S* d_out, S* d_qkv) {
  if constexpr (std::is_same_v<S, T>) {
    if (in_place<S>(head.width)) return attend_backward_whole(head, buffer, d_out, d_qkv);
  }
  const OwnHead<T> own(head, buffer);
  for (int64_t i = 0; i < head.length; ++i) {
    convert_n(d_out + i * head.out_stride, head.width, own.out + i * own.head.out_stride);
  }
  attend_backward_whole(own.head, own.buffer, own.out, own.d_qkv);
  for (int64_t part = 0; part < 3; ++part) {
    for (int64_t i = 0; i < head.length; ++i) {
      convert_n(own.d_qkv + own.head.offset(part, i), head.width, d_qkv + head.offset(part, i));
    }
  }
}
