// One plane of BatchNorm with its moments, and its gradient; see batch_norm_matching.cpp.

// y = x·scale + offset. A block is read twice, the second time from cache: its moments are taken
// around its own mean, so that the variance stays accurate however large the mean is.
template <typename T>
Moments normalize(const T* __restrict x, T* __restrict y, int64_t size, T scale, T offset) {
  constexpr int64_t kBlock = 256;  // short enough for sums in T
  Moments moments;
  for (int64_t start = 0; start < size; start += kBlock) {
    const int64_t count = std::min(kBlock, size - start);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = start; i < start + count; ++i) sum += x[i];
    const T centre = sum / static_cast<T>(count);
    T drift = 0, squares = 0;
#pragma omp simd reduction(+ : drift, squares)
    for (int64_t i = start; i < start + count; ++i) {
      const T difference = x[i] - centre;
      drift += difference;
      squares += difference * difference;
      y[i] = x[i] * scale + offset;
    }
    const double rest = static_cast<double>(drift) / static_cast<double>(count);
    moments.add({static_cast<double>(count), centre + rest, squares - drift * rest});
  }
  return moments;
}

// dx = grad·scale + offset + slope·x
template <typename T>
void normalize_backward(const T* __restrict grad, const T* __restrict x, T* __restrict dx,
                        int64_t size, T scale, T offset, T slope) {
  for (int64_t i = 0; i < size; ++i) dx[i] = grad[i] * scale + offset + slope * x[i];
}
