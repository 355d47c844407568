// BatchNorm of one plane with the moments of its input, and the gradient; see
// batch_norm_matching.cpp.

// Writes y = x·scale + offset and returns the moments of x. Each block of x is read twice, the
// second time from cache. Its squares are taken around its own mean, which keeps the variance
// accurate for any mean.
template <typename T>
Moments normalize_plane(const T* __restrict x, T* __restrict y, int64_t size, T scale, T offset) {
  constexpr int64_t kSumBlock = 256;  // small enough for sums in T
  Moments moments;
  for (int64_t start = 0; start < size; start += kSumBlock) {
    const int64_t count = std::min(kSumBlock, size - start);
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
void normalize_plane_backward(const T* __restrict grad, const T* __restrict x, T* __restrict dx,
                              int64_t size, T scale, T offset, T slope) {
  for (int64_t i = 0; i < size; ++i) dx[i] = grad[i] * scale + offset + slope * x[i];
}
