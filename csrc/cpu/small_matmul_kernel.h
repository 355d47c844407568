// GEMM of small matrices with any row stride, in register tiles; see gather_attention_kernel.h.

// The largest tiles of sums, rows x vectors, that fit in registers beside their operands: 4 x 3
// with 16 registers, 8 x 3 and 6 x 4 with 32. With four vectors, one tile spans a head of width 64
// in AVX-512.
constexpr int kTileVecs = kVectorRegisters == 32 ? 4 : 3;
constexpr int kMostTileRows = kVectorRegisters / 4;

constexpr int tile_rows(int vecs) { return vecs == 4 ? 6 : kMostTileRows; }

// A matrix whose rows are `stride` elements apart.
template <typename T>
struct Rows {
  T* data = nullptr;
  int64_t stride = 0;

  T* operator[](int64_t i) const { return data + i * stride; }

  // The rest of the matrix, from this element on.
  Rows tail(int64_t row, int64_t column) const {
    return data ? Rows{data + row * stride + column, stride} : Rows{};
  }
};

// A left operand with any strides: a(r, k) = data[r·row + k·step].
template <typename T>
struct Factor {
  const T* data;
  int64_t row, step;
};

// How an element of a and a vector of b are multiplied: the type of the sums, that of a vector of
// b, and the step itself.
template <typename E>
struct Product {
  using Sum = E;
  using Operand = Vec<E>;
  static void add(Vec<E>& sum, const E& a, const Vec<E>& b) { sum += a * b; }
};

template <typename E>
using SumOf = typename Product<E>::Sum;

// c[r, v] = c_in[r, v] + Σ_k a(r, k) b[k, v] for one tile of c, held in registers. A null c_in
// counts as zeros.
template <typename E, int kVecs, int kTileRows>
void matmul_tile(const Factor<E>& a, const Rows<const E>& b, const Rows<const SumOf<E>>& c_in,
                 const Rows<SumOf<E>>& c, int64_t depth) {
  using T = SumOf<E>;
  using V = Vec<T>;
  // The pragmas unroll every loop over sums, because an array that a loop indexes lives in memory.
  V sums[kTileRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      sums[r][v] = V{};
      // c is stored only at the end. Prefetching it now keeps those stores from holding up the next
      // tile.
      __builtin_prefetch(c[r] + v * lanes<T>(), 1);
    }
  }
  const E* a_step = a.data;
  const E* b_row = b.data;
  for (int64_t k = 0; k < depth; ++k, a_step += a.step, b_row += b.stride) {
    typename Product<E>::Operand row[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      row[v] = load<typename Product<E>::Operand>(b_row + v * lanes<E>());
    }
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) Product<E>::add(sums[r][v], a_step[r * a.row], row[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
    if (c_in.data) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sums[r][v] += load<V>(c_in[r] + v * lanes<T>());
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) store(c[r] + v * lanes<T>(), sums[r][v]);
  }
}

template <typename E>
using Tile = void (*)(const Factor<E>&, const Rows<const E>&, const Rows<const SumOf<E>>&,
                      const Rows<SumOf<E>>&, int64_t);

template <typename E, int kVecs, int... kRow>
inline Tile<E> tile_of(int64_t rows, std::integer_sequence<int, kRow...>) {
  static constexpr Tile<E> kTiles[] = {matmul_tile<E, kVecs, kRow + 1>...};
  return kTiles[rows - 1];
}

// kVecs vectors of columns of c = c_in + a · b, in tiles of at most tile_rows(kVecs) rows.
template <typename E, int kVecs>
void matmul_panel(const Factor<E>& a, const Rows<const E>& b, const Rows<const SumOf<E>>& c_in,
                  const Rows<SumOf<E>>& c, int64_t rows, int64_t depth) {
  constexpr int kMost = tile_rows(kVecs);
  for (int64_t r = 0; r < rows; r += kMost) {
    const int64_t count = std::min<int64_t>(kMost, rows - r);
    const Tile<E> tile = tile_of<E, kVecs>(count, std::make_integer_sequence<int, kMost>{});
    tile({a.data + r * a.row, a.row, a.step}, b, c_in.tail(r, 0), c.tail(r, 0), depth);
  }
}

// c [rows, columns] = c_in + a [rows, depth] · b [depth, columns]. Columns are rounded up to whole
// vectors.
template <typename E>
void matmul(const Factor<E>& a, const Rows<const E>& b, const Rows<SumOf<E>>& c, int64_t rows,
            int64_t columns, int64_t depth, const Rows<const SumOf<E>>& c_in = {}) {
  const int64_t vecs = ceil_div(columns, lanes<E>());
  const int64_t panels = ceil_div(vecs, kTileVecs);
  int64_t done = 0;
  for (int64_t panel = 0; panel < panels; ++panel) {
    // Panels have nearly equal widths: 4 vectors are 2 + 2, not 3 + 1.
    const int64_t count = ceil_div(vecs - done, panels - panel);
    const auto run = count == kTileVecs ? matmul_panel<E, kTileVecs>
                     : count == 3       ? matmul_panel<E, 3>
                     : count == 2       ? matmul_panel<E, 2>
                                        : matmul_panel<E, 1>;
    const int64_t at = done * lanes<E>();
    run(a, b.tail(0, at), c_in.tail(0, at), c.tail(0, at), rows, depth);
    done += count;
  }
}
