// Products of small matrices whose rows lie anywhere, in tiles of sums; see
// gather_attention_kernel.h.

// Tiles of sums that fit in registers beside the vectors they are made from, rows by vectors: 4 x
// 3, or with 32 registers 8 x 3 and 6 x 4, where a head 64 wide is one tile across.
constexpr int kTileVecs = kVectorRegisters == 32 ? 4 : 3;
constexpr int kMostTileRows = kVectorRegisters / 4;

constexpr int tile_rows(int vecs) { return vecs == 4 ? 6 : kMostTileRows; }

// Rows of a matrix, `stride` apart.
template <typename T>
struct Rows {
  T* data = nullptr;
  int64_t stride = 0;

  T* operator[](int64_t i) const { return data + i * stride; }

  // The rest of the matrix from an element on.
  Rows tail(int64_t row, int64_t column) const {
    return data ? Rows{data + row * stride + column, stride} : Rows{};
  }
};

// A matrix read as a(r, k) = data[r·row + k·step].
template <typename T>
struct Factor {
  const T* data;
  int64_t row, step;
};

// c[r, v] = prior[r, v] + Σ_k a(r, k) b[k, v] for a tile of c that is held in registers; no prior
// counts as zeros.
template <typename T, int kVecs, int kTileRows>
void multiply_tile(const Factor<T>& a, const Rows<const T>& b, const Rows<const T>& prior,
                   const Rows<T>& c, int64_t depth) {
  using V = Vec<T>;
  // Unrolled by name, because sums that are indexed by a loop live in memory.
  V sums[kTileRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      sums[r][v] = V{};
      // It is stored to long from now, where waiting for memory would hold up the next tile.
      __builtin_prefetch(c[r] + v * lanes<T>(), 1);
    }
  }
  const T* a_step = a.data;
  const T* b_row = b.data;
  for (int64_t k = 0; k < depth; ++k, a_step += a.step, b_row += b.stride) {
    V row[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) row[v] = load<V>(b_row + v * lanes<T>());
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sums[r][v] += a_step[r * a.row] * row[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
    if (prior.data) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sums[r][v] += load<V>(prior[r] + v * lanes<T>());
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) store(c[r] + v * lanes<T>(), sums[r][v]);
  }
}

template <typename T>
using Tile = void (*)(const Factor<T>&, const Rows<const T>&, const Rows<const T>&, const Rows<T>&,
                      int64_t);

template <typename T, int kVecs, int... kRow>
inline Tile<T> tile_of(int64_t rows, std::integer_sequence<int, kRow...>) {
  static constexpr Tile<T> kTiles[] = {multiply_tile<T, kVecs, kRow + 1>...};
  return kTiles[rows - 1];
}

// A panel of kVecs vectors of columns of c = prior + a · b, in tiles of no more rows than it has.
template <typename T, int kVecs>
void multiply_panel(const Factor<T>& a, const Rows<const T>& b, const Rows<const T>& prior,
                    const Rows<T>& c, int64_t rows, int64_t depth) {
  constexpr int kMost = tile_rows(kVecs);
  for (int64_t r = 0; r < rows; r += kMost) {
    const int64_t count = std::min<int64_t>(kMost, rows - r);
    const Tile<T> tile = tile_of<T, kVecs>(count, std::make_integer_sequence<int, kMost>{});
    tile({a.data + r * a.row, a.row, a.step}, b, prior.tail(r, 0), c.tail(r, 0), depth);
  }
}

// c [rows, columns] = prior + a [rows, depth] · b [depth, columns], in whole vectors of columns.
template <typename T>
void multiply(const std::type_identity_t<Factor<T>>& a,
              const std::type_identity_t<Rows<const T>>& b, const Rows<T>& c, int64_t rows,
              int64_t columns, int64_t depth,
              const std::type_identity_t<Rows<const T>>& prior = {}) {
  const int64_t vecs = ceil_div(columns, lanes<T>());
  const int64_t panels = ceil_div(vecs, kTileVecs);
  int64_t done = 0;
  for (int64_t panel = 0; panel < panels; ++panel) {
    // Panels of nearly the same width: 4 vectors are 2 + 2, not 3 + 1.
    const int64_t count = ceil_div(vecs - done, panels - panel);
    const auto run = count == kTileVecs ? multiply_panel<T, kTileVecs>
                     : count == 3       ? multiply_panel<T, 3>
                     : count == 2       ? multiply_panel<T, 2>
                                        : multiply_panel<T, 1>;
    const int64_t at = done * lanes<T>();
    run(a, b.tail(0, at), prior.tail(0, at), c.tail(0, at), rows, depth);
    done += count;
  }
}
