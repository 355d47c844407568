// Attention of one (image, head) in bfloat16 by dot products of pairs (AVX512-BF16); see
// gather_attention_kernel.h for the order of its GEMMs.
//
// An instruction multiplies two neighbours along the depth of a GEMM and adds both products to a
// float32. So the left operand has pairs of neighbours in memory, and the right one rows of pairs:
// row k of it has elements 2k and 2k + 1 of each column. Softmax and sums are float32.

struct Pair {
  BFloat16 first, second;
};

template <>
struct Product<Pair> {
  using Sum = float;
  using Operand = Vec<uint32_t>;
  static void add(Vec<float>& sum, const Pair& a, const Vec<uint32_t>& b) {
    const __m512i both = _mm512_set1_epi32(load<int>(&a));
    sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)both, (__m512bh)b);
  }
};

// Sixteen numbers as the lower halves of words, rounded to bfloat16.
inline Vec<uint32_t> halves(const float* x) {
  const auto narrowed = (__m256i)_mm512_cvtneps_pbh((__m512)load<Vec<float>>(x));
  return (Vec<uint32_t>)_mm512_maskz_cvtepu16_epi32(0xFFFF, narrowed);
}

inline Vec<uint32_t> halves(const BFloat16* x) {
  const __m256i loaded = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return (Vec<uint32_t>)_mm512_maskz_cvtepu16_epi32(0xFFFF, loaded);
}

// Writes rows of pairs [⌈count/2⌉, width] of the rows of `from` [count, width]; behind an odd last
// row follow zeros.
template <typename S>
void pair_rows(const Rows<const S>& from, int64_t count, int64_t width, Pair* to) {
  for (int64_t i = 0; i < count; i += 2, to += width) {
    for (int64_t c = 0; c < width; c += lanes<float>()) {
      const auto second = i + 1 < count ? halves(from[i + 1] + c) : Vec<uint32_t>{};
      store(to + c, halves(from[i] + c) | second << 16);
    }
  }
}

// Writes rows of pairs [width/2, kQueryBlock] of the columns of `from` [count, width]: a transposed
// matrix of words. Columns that fill up the last vector become zero.
inline void pair_columns(const Rows<const BFloat16>& from, int64_t count, int64_t width, Pair* to) {
  using V = Vec<float>;
  constexpr int64_t kLanes = lanes<float>();
  for (int64_t r = 0; r < count; r += kLanes) {
    const int64_t rows = std::min(kLanes, count - r);
    for (int64_t c = 0; c < width / 2; c += kLanes) {
      V square[kLanes]{};
      for (int64_t i = 0; i < rows; ++i) square[i] = load<V>(from[r + i] + 2 * c);
      transpose_square<float>(square);
      for (int i = 0; i < kLanes; ++i) store(to + (c + i) * kQueryBlock + r, square[i]);
    }
  }
}

inline void narrow_n(const float* from, int64_t count, BFloat16* to) {
  for (int64_t i = 0; i < count; i += lanes<float>()) {
    const auto narrowed = (__m256i)_mm512_cvtneps_pbh((__m512)load<Vec<float>>(from + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), narrowed);
  }
}

// Scratch memory of one task, cut from one buffer. Rows of pairs are half as many.
struct PairsWorkspace {
  float *d_k, *d_v;                 // [length, width]
  float* out;                       // [kQueryBlock, width], of the output or of queries
  float *p, *d_p;                   // [length, kQueryBlock]
  Pair *k_rows, *v_rows;            // [⌈length/2⌉, width]
  Pair *q_rows, *d_out_rows;        // [kQueryBlock/2, width]
  Pair *q_columns, *d_out_columns;  // [width/2, kQueryBlock]
  Pair* p_rows;                     // [⌈length/2⌉, kQueryBlock]
  BFloat16 *q, *p_narrow;           // [kQueryBlock, width], [length, kQueryBlock]

  static int64_t size(int64_t length, int64_t width) {
    const int64_t even = round_up(length, 2);
    return 3 * even * (width + kQueryBlock) + 7 * kQueryBlock * width / 2;
  }

  PairsWorkspace(int64_t length, int64_t width, float* buffer) {
    const int64_t even = round_up(length, 2), half = kQueryBlock * width / 2;
    const auto cut = [&](auto*& rows, int64_t floats) {
      rows = reinterpret_cast<std::remove_reference_t<decltype(rows)>>(buffer);
      buffer += floats;
    };
    for (float** rows : {&d_k, &d_v}) cut(*rows, even * width);
    for (Pair** rows : {&k_rows, &v_rows}) cut(*rows, even * width / 2);
    for (float** rows : {&p, &d_p}) cut(*rows, even * kQueryBlock);
    cut(p_rows, even * kQueryBlock / 2);
    cut(p_narrow, even * kQueryBlock / 2);
    cut(out, 2 * half);
    for (Pair** rows : {&q_rows, &d_out_rows, &q_columns, &d_out_columns}) cut(*rows, half);
    cut(q, half);
  }
};

// The rows of k or v in qkv as a left operand whose depth is the width.
inline Factor<Pair> pairs_of(const Head<BFloat16>& head, int64_t part) {
  const BFloat16* rows = part_rows(head, part, head.qkv).data;
  return {reinterpret_cast<const Pair*>(rows), head.row_stride / 2, 1};
}

// Writes pᵀ [keys, kQueryBlock] of the queries from `begin` on to w.p, and these queries with their
// bias to w.q.
inline void pair_probabilities(const Head<BFloat16>& head, int64_t begin, int64_t queries,
                               const PairsWorkspace& w) {
  const int64_t width = head.width;
  for (int64_t i = 0; i < queries; ++i) {
    const BFloat16* row = head.qkv + head.offset(0, begin + i);
    for (int64_t c = 0; c < width; c += lanes<float>()) {
      const Vec<float> bias = head.q_bias ? load<Vec<float>>(head.q_bias + c) : Vec<float>{};
      store_narrow(w.q + i * width + c, load_wide(row + c) + bias);
    }
  }
  pair_columns({w.q, width}, queries, width, w.q_columns);
  matmul<Pair>(pairs_of(head, 1), {w.q_columns, kQueryBlock}, {w.p, kQueryBlock}, head.length,
               queries, width / 2);
  for (int64_t i = 0; i < head.length * kQueryBlock; ++i) w.p[i] *= head.scale;
  softmax(w.p, head.length, queries);
}

// Elements of the buffer that attend_pairs() and attend_pairs_backward() need.
inline int64_t pairs_workspace_size(int64_t length, int64_t width) {
  return PairsWorkspace::size(length, width);
}

// attend() for a width that is a multiple of 32, without token_index and importance, which the
// engine never asks for.
inline void attend_pairs(const Head<BFloat16>& head, float* buffer, BFloat16* out, float*) {
  const int64_t width = head.width, depth = ceil_div(head.length, 2);
  const PairsWorkspace w(head.length, width, buffer);
  pair_rows(part_rows(head, 2, head.qkv), head.length, width, w.v_rows);
  for (int64_t begin = 0; begin < head.length; begin += kQueryBlock) {
    const int64_t queries = std::min(kQueryBlock, head.length - begin);
    pair_probabilities(head, begin, queries, w);
    pair_rows(Rows<const float>{w.p, kQueryBlock}, head.length, kQueryBlock, w.p_rows);
    matmul<Pair>({w.p_rows, 1, kQueryBlock}, {w.v_rows, width}, {w.out, width}, queries, width,
                 depth);
    for (int64_t i = 0; i < queries; ++i) {
      narrow_n(w.out + i * width, width, out + (begin + i) * head.out_stride);
    }
  }
}

// attend_backward() for the same heads.
inline void attend_pairs_backward(const Head<BFloat16>& head, float* buffer, const BFloat16* d_out,
                                  BFloat16* d_qkv) {
  const int64_t width = head.width, length = head.length;
  const PairsWorkspace w(length, width, buffer);
  const Factor<Pair> narrow{reinterpret_cast<const Pair*>(w.p_narrow), kQueryBlock / 2, 1};
  pair_rows(part_rows(head, 1, head.qkv), length, width, w.k_rows);
  for (int64_t begin = 0; begin < length; begin += kQueryBlock) {
    const int64_t queries = std::min(kQueryBlock, length - begin), depth = ceil_div(queries, 2);
    pair_probabilities(head, begin, queries, w);
    const Rows<const BFloat16> d_rows{d_out + begin * head.out_stride, head.out_stride};
    pair_columns(d_rows, queries, width, w.d_out_columns);
    matmul<Pair>(pairs_of(head, 2), {w.d_out_columns, kQueryBlock}, {w.d_p, kQueryBlock}, length,
                 queries, width / 2);
    softmax_backward(w.p, w.d_p, length, queries, head.scale);

    pair_rows(d_rows, queries, width, w.d_out_rows);
    narrow_n(w.p, length * kQueryBlock, w.p_narrow);
    matmul<Pair>(narrow, {w.d_out_rows, width}, {w.d_v, width}, length, width, depth,
                 {begin ? w.d_v : nullptr, width});
    pair_rows(Rows<const BFloat16>{w.q, width}, queries, width, w.q_rows);
    narrow_n(w.d_p, length * kQueryBlock, w.p_narrow);
    matmul<Pair>(narrow, {w.q_rows, width}, {w.d_k, width}, length, width, depth,
                 {begin ? w.d_k : nullptr, width});
    pair_rows(Rows<const float>{w.d_p, kQueryBlock}, length, kQueryBlock, w.p_rows);
    matmul<Pair>({w.p_rows, 1, kQueryBlock}, {w.k_rows, width}, {w.out, width}, queries, width,
                 ceil_div(length, 2));
    for (int64_t i = 0; i < queries; ++i) {
      narrow_n(w.out + i * width, width, d_qkv + head.offset(0, begin + i));
    }
  }
  for (int64_t i = 0; i < length; ++i) {
    narrow_n(w.d_k + i * width, width, d_qkv + head.offset(1, i));
    narrow_n(w.d_v + i * width, width, d_qkv + head.offset(2, i));
  }
}
