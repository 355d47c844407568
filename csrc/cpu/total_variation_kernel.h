// Sums over the differences of one plane, and the gradient of its pixels; see total_variation.cpp.

// Half a vector of AVX-512: rows of a patch are short, and memory bandwidth is the limit anyway.
constexpr int kPixelBytes = kVectorBytes < 32 ? kVectorBytes : 32;

template <typename T>
struct PixelVec {
  using Type = Vec<T, kPixelBytes>;
  static constexpr int kLanes = kPixelBytes / sizeof(T);

  // Sets the first `count` lanes to zero.
  static Type without_first(const Type& vector, int64_t count) {
    Type lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<T>(i);
    return lane < static_cast<T>(count) ? Type{} : vector;
  }

  static Type absolute(const Type& vector) {
    using Unsigned = Vec<Bits<T>, kPixelBytes>;
    return (Type)((Unsigned)vector & (static_cast<Bits<T>>(-1) >> 1));
  }
};

// Adds up the differences of pairs of pixels in one direction.
template <typename T>
class PairSums {
 public:
  using V = typename PixelVec<T>::Type;
  static constexpr int kLanes = PixelVec<T>::kLanes;

  void add(const V& absolute, const V& squares, int64_t count) {
    absolute_ += __builtin_convertvector(absolute, Wide);
    squares_ += __builtin_convertvector(squares, Wide);
    count_ += count;
  }

  // Adds the differences between the pixels of a rectangle and the pixels `neighbour` elements
  // further.
  void add(const T* plane, int64_t width, const Rectangle& pixels, int64_t neighbour) {
    const int64_t columns = pixels.right - pixels.left;
    V absolute{}, squares{};
    double rest_absolute = 0, rest_squares = 0;
    for (int64_t y = pixels.top; y < pixels.bottom; ++y) {
      const T* here = plane + y * width + pixels.left;
      const T* there = here + neighbour;
      if (columns < kLanes) {
        for (int64_t x = 0; x < columns; ++x) {
          const T difference = here[x] - there[x];
          rest_absolute += std::abs(difference);
          rest_squares += static_cast<double>(difference) * difference;
        }
        continue;
      }
      for (int64_t x = 0; x < columns; x += kLanes) {
        const int64_t at = std::min(x, columns - kLanes);
        V difference = load<V>(here + at) - load<V>(there + at);
        if (at < x) difference = PixelVec<T>::without_first(difference, x - at);
        absolute += PixelVec<T>::absolute(difference);
        squares += difference * difference;
      }
    }
    add(absolute, squares, columns * (pixels.bottom - pixels.top));
    rest_absolute_ += rest_absolute;
    rest_squares_ += rest_squares;
  }

  Sums total() const {
    Sums result{rest_absolute_, rest_squares_, static_cast<double>(count_)};
    for (int i = 0; i < kLanes; ++i) {
      result.absolute += absolute_[i];
      result.squares += squares_[i];
    }
    return result;
  }

 private:
  using Wide = Vec<double, kLanes * sizeof(double)>;

  Wide absolute_{}, squares_{};
  double rest_absolute_ = 0, rest_squares_ = 0;
  int64_t count_ = 0;
};

// Adds all differences of the pixels of a rectangle that is at least a vector wide and whose pixels
// have all four neighbours. Meanwhile the rows `next` elements further are prefetched.
template <typename T>
void add_inside(const T* plane, const Grid& grid, const Rectangle& pixels, int64_t next,
                PairSums<T>* pairs) {
  using V = typename PairSums<T>::V;
  constexpr int64_t kLanes = PairSums<T>::kLanes;
  const int64_t columns = pixels.right - pixels.left;
  V absolute[kKinds] = {}, squares[kKinds] = {};
  for (int64_t y = pixels.top; y < pixels.bottom; ++y) {
    const T* row = plane + y * grid.width + pixels.left;
    if (next) prefetch(row + next, columns);
    for (int64_t x = 0; x < columns; x += kLanes) {
      const int64_t at = std::min(x, columns - kLanes);
      const V here = load<V>(row + at);
      for (int kind = 0; kind < kKinds; ++kind) {
        V difference = here - load<V>(row + at + grid.elements(kNeighbours[kind]));
        if (at < x) difference = PixelVec<T>::without_first(difference, x - at);
        absolute[kind] += PixelVec<T>::absolute(difference);
        squares[kind] += difference * difference;
      }
    }
  }
  for (int kind = 0; kind < kKinds; ++kind) {
    pairs[kind].add(absolute[kind], squares[kind], columns * (pixels.bottom - pixels.top));
  }
}

// Adds all differences of a cell's pixels. Those of pixels that have all four neighbours are added
// together, the others direction by direction.
template <typename T>
void add_cell(const T* plane, const Grid& grid, const Rectangle& cell, int64_t next,
              PairSums<T>* pairs) {
  Rectangle inside = cell.within(grid.inside());
  const bool wide = inside.right - inside.left >= PairSums<T>::kLanes && !inside.empty();
  if (wide) {
    add_inside(plane, grid, inside, next, pairs);
    if (inside == cell) return;
  } else {
    inside = {cell.top, cell.left, cell.top, cell.left};
  }
  for (int kind = 0; kind < kKinds; ++kind) {
    const Neighbour& neighbour = kNeighbours[kind];
    const Rectangle all = cell.within(grid.plane().seen_from(neighbour));
    for (const Rectangle& rest : {Rectangle{all.top, all.left, inside.bottom, inside.left},
                                  Rectangle{all.top, inside.right, inside.bottom, all.right},
                                  Rectangle{inside.bottom, all.left, all.bottom, all.right}}) {
      if (!rest.empty()) pairs[kind].add(plane, grid.width, rest, grid.elements(neighbour));
    }
  }
}

template <typename T>
void sum_differences(const T* plane, const Grid& grid, const Cells& cells, Sums* sums) {
  PairSums<T> pairs[kKinds];
  for (int64_t i = 0; i < cells.count; ++i) {
    const Rectangle cell = grid.cell(cells.indices[i]);
    const Rectangle after = grid.cell(cells.indices[std::min(i + 1, cells.count - 1)]);
    const int64_t next = (after.top - cell.top) * grid.width + after.left - cell.left;
    add_cell(plane, grid, cell, next, pairs);
    for (int kind = 0; kind < kKinds; ++kind) {
      const Neighbour& neighbour = kNeighbours[kind];
      for_each_border(grid, cells, cells.indices[i], neighbour, [&](const Rectangle& pixels) {
        pairs[kind].add(plane, grid.width, pixels, grid.elements(neighbour));
      });
    }
  }
  for (int kind = 0; kind < kKinds; ++kind) sums[kind] = pairs[kind].total();
}

// The gradient of a difference d: d |d| = sign(d) and d ‖d‖ = d / ‖d‖, each times the incoming
// gradient. Without kSigns the first one is zero.
template <bool kSigns, typename V, typename T>
inline V slope(const V& difference, const Slopes<T>& slopes) {
  if constexpr (!kSigns) return difference * slopes.per_norm;
  const V zero{}, step = zero + slopes.per_count;
  const V sign = (difference > 0 ? step : zero) - (difference < 0 ? step : zero);
  return difference * slopes.per_norm + sign;
}

template <bool kSigns, typename T>
inline T scalar_slope(T difference, const Slopes<T>& slopes) {
  if constexpr (!kSigns) return difference * slopes.per_norm;
  const T sign = static_cast<T>((difference > 0) - (difference < 0));
  return difference * slopes.per_norm + sign * slopes.per_count;
}

// Size of the scratch memory of write_gradient(): three rows of pixels, each with the pixels beside
// it.
template <typename T>
int64_t rows_size(int64_t columns) {
  return 3 * (columns + 2 * lanes<T>() + 1);
}

// Writes the gradient of a cell's pixels. A difference changes its sign if its two pixels are
// swapped, so each pixel sums the slopes of its differences to all eight neighbours. Neighbours
// outside the plane don't count. Three rows (above, here, below) are copied to `rows` if vectors
// would read outside the plane, or more than one pixel beside the cell.
template <bool kSigns, typename T>
void write_gradient(const T* plane, const Grid& grid, const Rectangle& cell,
                    const Slopes<T>* slopes, T* rows, T* result) {
  using V = Vec<T>;
  constexpr int64_t kLanes = lanes<T>();
  const int64_t columns = cell.right - cell.left, size = rows_size<T>(columns) / 3;
  const int64_t from = std::max<int64_t>(cell.left - 1, 0);
  const int64_t to = std::min(cell.right + 1, grid.width);
  const bool held = from == cell.left || to == cell.right || columns % kLanes;
  T* above_row = rows + 1;
  T* here_row = above_row + size;
  T* below_row = here_row + size;
  const auto hold = [&](int64_t y, T* row) {
    if (y >= 0 && y < grid.height) {
      std::copy(plane + y * grid.width + from, plane + y * grid.width + to, row + from - cell.left);
    }
  };
  if (held) {
    std::fill_n(rows, 3 * size, T{0});
    hold(cell.top - 1, above_row);
    hold(cell.top, here_row);
  }
  for (int64_t y = cell.top; y < cell.bottom; ++y) {
    const bool is_first = y == 0, is_last = y + 1 == grid.height;
    const Slopes<T> none{0, 0};
    const Slopes<T>&right = slopes[0], &down = is_last ? none : slopes[1];
    const Slopes<T>&down_right = is_last ? none : slopes[2],
          &down_left = is_last ? none : slopes[3];
    const Slopes<T>&up = is_first ? none : slopes[1], &up_left = is_first ? none : slopes[2];
    const Slopes<T>& up_right = is_first ? none : slopes[3];
    const T* here = plane + y * grid.width + cell.left;
    const T* above = is_first ? here : here - grid.width;
    const T* below = is_last ? here : here + grid.width;
    if (held) {
      hold(y + 1, below_row);
      here = here_row, above = above_row, below = below_row;
    }
    for (int64_t x = 0; x < columns; x += kLanes) {
      const V pixel = load<V>(here + x);
      V to_left = slope<kSigns>(pixel - load<V>(here + x - 1), right) +
                  slope<kSigns>(pixel - load<V>(above + x - 1), up_left) +
                  slope<kSigns>(pixel - load<V>(below + x - 1), down_left);
      V to_right = slope<kSigns>(pixel - load<V>(here + x + 1), right) +
                   slope<kSigns>(pixel - load<V>(above + x + 1), up_right) +
                   slope<kSigns>(pixel - load<V>(below + x + 1), down_right);
      if (held) {
        if (cell.left + x == 0) to_left[0] = 0;
        const int64_t last = grid.width - 1 - cell.left - x;
        if (last < kLanes) to_right[last] = 0;
      }
      const V sum = slope<kSigns>(pixel - load<V>(above + x), up) +
                    slope<kSigns>(pixel - load<V>(below + x), down) + to_left + to_right;
      T* out = result + y * grid.width + cell.left + x;
      if (x + kLanes <= columns) {
        store(out, sum);
      } else {
        std::memcpy(out, &sum, (columns - x) * sizeof(T));
      }
    }
    std::swap(above_row, here_row);
    std::swap(here_row, below_row);
  }
}

// Slopes of the differences across a border: straight across, and diagonally to the pixels one step
// back and one step ahead.
template <typename T>
struct Across {
  Slopes<T> straight, back, ahead;
};

// Adds to the gradient of one side of a neighbouring cell, `count` pixels that are `step` elements
// apart. Their differences are to pixels of this cell, `across` elements away.
template <bool kSigns, typename T>
void add_side(const T* pixels, int64_t count, int64_t step, int64_t across, const Across<T>& slopes,
              T* result) {
  using V = typename PixelVec<T>::Type;
  constexpr int64_t kLanes = PixelVec<T>::kLanes;
  int64_t i = 0;
  // A cell with rows this long has several rows, so the loads beside the cell stay inside the
  // plane.
  for (; step == 1 && i + kLanes <= count; i += kLanes) {
    const V pixel = load<V>(pixels + i);
    const T* there = pixels + i + across;
    V back = slope<kSigns>(pixel - load<V>(there - 1), slopes.back);
    V ahead = slope<kSigns>(pixel - load<V>(there + 1), slopes.ahead);
    if (i == 0) back[0] = 0;
    if (i + kLanes == count) ahead[kLanes - 1] = 0;
    store(result + i, load<V>(result + i) + slope<kSigns>(pixel - load<V>(there), slopes.straight) +
                          back + ahead);
  }
  for (; i < count; ++i) {
    const T* there = pixels + i * step + across;
    const T pixel = pixels[i * step];
    T sum = scalar_slope<kSigns>(pixel - *there, slopes.straight);
    if (i > 0) sum += scalar_slope<kSigns>(pixel - there[-step], slopes.back);
    if (i + 1 < count) sum += scalar_slope<kSigns>(pixel - there[step], slopes.ahead);
    result[i * step] += sum;
  }
}

// Adds the gradient of the pixels around an active cell that lie in cells that aren't active.
template <bool kSigns, typename T>
void add_surroundings(const T* plane, const Grid& grid, const Cells& cells, int64_t index,
                      const Slopes<T>* slopes, T* result) {
  const int64_t row = index / grid.columns, column = index % grid.columns, width = grid.width;
  const Rectangle cell = grid.cell(row, column);
  const auto &sideways = slopes[0], &vertical = slopes[1], &falling = slopes[2],
             &rising = slopes[3];
  for (int64_t down = -1; down <= 1; ++down) {
    for (int64_t right = -1; right <= 1; ++right) {
      const int64_t r = row + down, c = column + right;
      if (r < 0 || r >= grid.rows || c < 0 || c >= grid.columns) continue;
      if (cells.is_active[r * grid.columns + c]) continue;
      const int64_t y = down < 0 ? cell.top - 1 : down > 0 ? cell.bottom : cell.top;
      const int64_t x = right < 0 ? cell.left - 1 : right > 0 ? cell.right : cell.left;
      const int64_t at = y * width + x, across = -down * width - right;
      if (down && right) {
        result[at] +=
            scalar_slope<kSigns>(plane[at] - plane[at + across], down == right ? falling : rising);
      } else if (down) {
        const auto &back = down < 0 ? rising : falling, &ahead = down < 0 ? falling : rising;
        add_side<kSigns>(plane + at, cell.right - cell.left, 1, across,
                         Across<T>{vertical, back, ahead}, result + at);
      } else {
        const auto &back = right < 0 ? rising : falling, &ahead = right < 0 ? falling : rising;
        add_side<kSigns>(plane + at, cell.bottom - cell.top, width, across,
                         Across<T>{sideways, back, ahead}, result + at);
      }
    }
  }
}

template <bool kSigns, typename T>
void add_gradient(const T* plane, const Grid& grid, const Cells& cells, const Slopes<T>* slopes,
                  T* rows, T* result) {
  for (int64_t i = 0; i < cells.count; ++i) {
    const Rectangle cell = grid.cell(cells.indices[i]);
    write_gradient<kSigns>(plane, grid, cell, slopes, rows, result);
  }
  for (int64_t i = 0; i < cells.count; ++i) {
    add_surroundings<kSigns>(plane, grid, cells, cells.indices[i], slopes, result);
  }
}
