// One Adam step and clamp on a rectangle of one channel; see adam_clamp.cpp. Meanwhile the
// rectangle `next` elements further is prefetched, unless `next` is zero.

template <typename T>
void adam_clamp(T* images, const T* grad, T* exp_avg, T* exp_avg_sq, int64_t rows, int64_t columns,
                int64_t stride, int64_t next, const AdamStep<T>& step, T low, T high) {
  for (int64_t y = 0; y < rows; ++y) {
    if (next) {
      const int64_t at = y * stride + next;
      prefetch(images + at, columns);
      prefetch(grad + at, columns);
      prefetch(exp_avg + at, columns);
      prefetch(exp_avg_sq + at, columns);
    }
    T* __restrict p = images + y * stride;
    const T* __restrict g = grad + y * stride;
    T* __restrict m = exp_avg + y * stride;
    T* __restrict v = exp_avg_sq + y * stride;
    for (int64_t x = 0; x < columns; ++x) {
      m[x] += step.to_mean * (g[x] - m[x]);
      v[x] = step.keep_square * v[x] + step.to_square * g[x] * g[x];
      const T towards = step.rate * m[x] / (std::sqrt(v[x]) * step.root + step.eps);
      const T moved = step.keep_pixel * p[x] - towards;
      // Comparisons in this order pass a NaN on, so that a check of the loss finds it.
      const T raised = moved < low ? low : moved;
      p[x] = raised > high ? high : raised;
    }
  }
}
