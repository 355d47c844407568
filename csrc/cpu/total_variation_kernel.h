// Sums over the differences of one plane, and their gradient; see total_variation.cpp.

// Half of AVX-512: rows of a patch are short, and this is bound by memory anyway.
constexpr int kPixelBytes = kVectorBytes < 32 ? kVectorBytes : 32;

template <typename T>
struct PixelVec {
  using Type = Vec<T, kPixelBytes>;
  static constexpr int kLanes = kPixelBytes / sizeof(T);

  // Lanes before `count` become zero.
  static Type without_first(const Type& vector, int64_t count) {
    Type lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<T>(i);
    return lane < static_cast<T>(count) ? Type{} : vector;
  }
};

// Calls visit(x, done) for vectors that cover a row of `columns` >= kLanes pixels; the last one may
// overlap its predecessor, by `done` lanes.
template <int kLanes, typename Visit>
inline void for_each_vector(int64_t columns, const Visit& visit) {
  int64_t x = 0;
  for (; x + kLanes <= columns; x += kLanes) visit(x, 0);
  if (x < columns) visit(columns - kLanes, x - (columns - kLanes));
}

template <typename T>
class PairSums {
 public:
  // Adds the differences between the pixels of a rectangle and those `neighbour` elements further.
  void add(const T* plane, int64_t width, const Rectangle& pixels, int64_t neighbour) {
    const int64_t columns = pixels.right - pixels.left;
    count_ += columns * (pixels.bottom - pixels.top);
    V absolute{}, squares{};
    for (int64_t y = pixels.top; y < pixels.bottom; ++y) {
      const T* here = plane + y * width + pixels.left;
      const T* there = here + neighbour;
      if (columns < kLanes) {
        for (int64_t x = 0; x < columns; ++x) {
          const T difference = here[x] - there[x];
          rest_absolute_ += std::abs(difference);
          rest_squares_ += static_cast<double>(difference) * difference;
        }
        continue;
      }
      for_each_vector<kLanes>(columns, [&](int64_t x, int64_t done) {
        V difference = load<V>(here + x) - load<V>(there + x);
        if (done) difference = PixelVec<T>::without_first(difference, done);
        absolute += difference < 0 ? -difference : difference;
        squares += difference * difference;
      });
    }
    absolute_ += __builtin_convertvector(absolute, Wide);
    squares_ += __builtin_convertvector(squares, Wide);
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
  using V = typename PixelVec<T>::Type;
  static constexpr int kLanes = PixelVec<T>::kLanes;
  using Wide = Vec<double, kLanes * sizeof(double)>;

  Wide absolute_{}, squares_{};
  double rest_absolute_ = 0, rest_squares_ = 0;
  int64_t count_ = 0;
};

template <typename T>
void sum_differences(const T* plane, const Grid& grid, const Cells& cells, Sums* sums) {
  for (int kind = 0; kind < kKinds; ++kind) {
    PairSums<T> pairs;
    const Neighbour& neighbour = kNeighbours[kind];
    const auto add = [&](const Rectangle& pixels) {
      pairs.add(plane, grid.width, pixels, grid.elements(neighbour));
    };
    for_each_cell(grid, cells, [&](const Rectangle& cell) {
      const Rectangle pixels = cell.within(grid.plane().seen_from(neighbour));
      if (!pixels.empty()) add(pixels);
    });
    for_each_border(grid, cells, neighbour, add);
    sums[kind] = pairs.total();
  }
}

// d |d| = sign(d) and d ‖d‖ = d / ‖d‖, each times the incoming gradient.
template <typename V, typename T>
inline V slope(const V& difference, const Slopes<T>& slopes) {
  const V zero{}, step = zero + slopes.per_count;
  const V sign = (difference > 0 ? step : zero) - (difference < 0 ? step : zero);
  return difference * slopes.per_norm + sign;
}

template <typename T>
inline T scalar_slope(T difference, const Slopes<T>& slopes) {
  const T sign = static_cast<T>((difference > 0) - (difference < 0));
  return difference * slopes.per_norm + sign * slopes.per_count;
}

// Elements of three rows of pixels, each with the pixels around it.
template <typename T>
int64_t rows_size(int64_t columns) {
  return 3 * (columns + 2 * lanes<T>() + 1);
}

// Writes the gradient of a cell's pixels. A difference is odd in its two pixels, so the neighbour's
// share is the same slope seen from there: every pixel looks in all eight directions. The rows
// above, here and below are held in `rows`, with zeros outside the plane, whose slopes don't count.
template <typename T>
void write_gradient(const T* plane, const Grid& grid, const Rectangle& cell,
                    const Slopes<T>* slopes, T* rows, T* result) {
  using V = Vec<T>;
  constexpr int64_t kLanes = lanes<T>();
  const int64_t columns = cell.right - cell.left, size = rows_size<T>(columns) / 3;
  const int64_t from = std::max<int64_t>(cell.left - 1, 0);
  const int64_t to = std::min(cell.right + 1, grid.width);
  T* held[3] = {rows + 1, rows + size + 1, rows + 2 * size + 1};
  const auto hold = [&](int64_t y, T* row) {
    if (y >= 0 && y < grid.height) {
      std::copy(plane + y * grid.width + from, plane + y * grid.width + to, row + from - cell.left);
    }
  };
  std::fill_n(rows, 3 * size, T{0});
  hold(cell.top - 1, held[0]);
  hold(cell.top, held[1]);
  for (int64_t y = cell.top; y < cell.bottom; ++y) {
    hold(y + 1, held[2]);
    const Slopes<T> none{0, 0};
    const Slopes<T>&right = slopes[0], &down = y + 1 < grid.height ? slopes[1] : none;
    const Slopes<T>& down_right = y + 1 < grid.height ? slopes[2] : none;
    const Slopes<T>& down_left = y + 1 < grid.height ? slopes[3] : none;
    const Slopes<T>&up = y > 0 ? slopes[1] : none, &up_left = y > 0 ? slopes[2] : none;
    const Slopes<T>& up_right = y > 0 ? slopes[3] : none;
    for (int64_t x = 0; x < columns; x += kLanes) {
      const T *above = held[0] + x, *here = held[1] + x, *below = held[2] + x;
      const V pixel = load<V>(here);
      V to_left = slope(pixel - load<V>(here - 1), right) +
                  slope(pixel - load<V>(above - 1), up_left) +
                  slope(pixel - load<V>(below - 1), down_left);
      V to_right = slope(pixel - load<V>(here + 1), right) +
                   slope(pixel - load<V>(above + 1), up_right) +
                   slope(pixel - load<V>(below + 1), down_right);
      if (cell.left + x == 0) to_left[0] = 0;
      const int64_t last = grid.width - 1 - cell.left - x;
      if (last < kLanes) to_right[last] = 0;
      const V sum = slope(pixel - load<V>(above), up) + slope(pixel - load<V>(below), down) +
                    to_left + to_right;
      T* out = result + y * grid.width + cell.left + x;
      if (x + kLanes <= columns) {
        store(out, sum);
      } else {
        std::memcpy(out, &sum, (columns - x) * sizeof(T));
      }
    }
    std::swap(held[0], held[1]);
    std::swap(held[1], held[2]);
  }
}

// Adds to the gradient of a side of a neighbouring cell, pixels `step` apart, what comes from the
// pixels of this cell across the border: one `across` away, and one step back and ahead of that.
template <typename T>
void add_side(const T* pixels, int64_t count, int64_t step, int64_t across,
              const Slopes<T>& straight, const Slopes<T>& back, const Slopes<T>& ahead, T* result) {
  for (int64_t i = 0; i < count; ++i, pixels += step, result += step) {
    T sum = scalar_slope(*pixels - pixels[across], straight);
    if (i > 0) sum += scalar_slope(*pixels - pixels[across - step], back);
    if (i + 1 < count) sum += scalar_slope(*pixels - pixels[across + step], ahead);
    *result += sum;
  }
}

// Adds the gradient of the pixels around a cell, in cells that aren't kept.
template <typename T>
void add_surroundings(const T* plane, const Grid& grid, const Cells& cells, int64_t index,
                      const Slopes<T>* slopes, T* result) {
  const int64_t row = index / grid.columns(), column = index % grid.columns(), width = grid.width;
  const Rectangle cell = grid.cell(row, column);
  const auto &sideways = slopes[0], &vertical = slopes[1], &falling = slopes[2],
             &rising = slopes[3];
  for (int64_t down = -1; down <= 1; ++down) {
    for (int64_t right = -1; right <= 1; ++right) {
      const int64_t r = row + down, c = column + right;
      if (r < 0 || r >= grid.rows() || c < 0 || c >= grid.columns()) continue;
      if (cells.kept[r * grid.columns() + c]) continue;
      const int64_t y = down < 0 ? cell.top - 1 : down > 0 ? cell.bottom : cell.top;
      const int64_t x = right < 0 ? cell.left - 1 : right > 0 ? cell.right : cell.left;
      const int64_t at = y * width + x, across = -down * width - right;
      if (down && right) {
        const auto& slope = down == right ? falling : rising;
        add_side(plane + at, 1, 0, across, slope, slope, slope, result + at);
      } else if (down) {
        add_side(plane + at, cell.right - cell.left, 1, across, vertical,
                 down < 0 ? rising : falling, down < 0 ? falling : rising, result + at);
      } else {
        add_side(plane + at, cell.bottom - cell.top, width, across, sideways,
                 right < 0 ? rising : falling, right < 0 ? falling : rising, result + at);
      }
    }
  }
}

template <typename T>
void add_gradient(const T* plane, const Grid& grid, const Cells& cells, const Slopes<T>* slopes,
                  T* rows, T* result) {
  for_each_cell(grid, cells, [&](const Rectangle& cell) {
    write_gradient(plane, grid, cell, slopes, rows, result);
  });
  for (int64_t i = 0; i < cells.count; ++i) {
    add_surroundings(plane, grid, cells, cells.indices[i], slopes, result);
  }
}
