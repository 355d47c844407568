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
    for_each_rectangle(grid, cells, kNeighbours[kind], [&](const Rectangle& pixels) {
      pairs.add(plane, grid.width, pixels, grid.elements(kNeighbours[kind]));
    });
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
void add_slopes(const T* plane, int64_t width, const Rectangle& pixels, int64_t neighbour,
                const Slopes<T>& slopes, T* result) {
  using V = typename PixelVec<T>::Type;
  constexpr int kLanes = PixelVec<T>::kLanes;
  const int64_t columns = pixels.right - pixels.left;
  for (int64_t y = pixels.top; y < pixels.bottom; ++y) {
    const T* here = plane + y * width + pixels.left;
    const T* there = here + neighbour;
    T* to = result + y * width + pixels.left;
    if (columns < kLanes) {
      for (int64_t x = 0; x < columns; ++x) {
        const T difference = here[x] - there[x];
        const T sign = static_cast<T>((difference > 0) - (difference < 0));
        to[x] += difference * slopes.per_norm + sign * slopes.per_count;
      }
      continue;
    }
    for_each_vector<kLanes>(columns, [&](int64_t x, int64_t done) {
      V change = slope(load<V>(here + x) - load<V>(there + x), slopes);
      if (done) change = PixelVec<T>::without_first(change, done);
      store(to + x, load<V>(to + x) + change);
    });
  }
}

// A difference is odd in its two pixels, so the neighbour's share is the same slope seen from
// there: every pixel looks in all eight directions and writes only to itself.
template <typename T>
void add_gradient(const T* plane, const Grid& grid, const Cells& cells, const Slopes<T>* slopes,
                  T* result) {
  for (int i = 0; i < 2 * kKinds; ++i) {
    for_each_rectangle(grid, cells, kNeighbours[i], [&](const Rectangle& pixels) {
      add_slopes(plane, grid.width, pixels, grid.elements(kNeighbours[i]), slopes[i % kKinds],
                 result);
    });
  }
}
