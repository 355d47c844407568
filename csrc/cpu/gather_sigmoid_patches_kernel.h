// The sigmoid of a row of pixels, normalised, and its gradient; see gather_sigmoid_patches.cpp.

#include "exp_kernel.h"

// Calls run(x, y) on vectors of two rows, and stores y, which it may change. The last vector is
// filled up with zeros.
template <typename T, typename Run>
inline void for_each_vector(const T* x, T* y, int64_t count, const Run& run) {
  int64_t i = 0;
  for (; i + lanes<T>() <= count; i += lanes<T>()) {
    store(y + i, run(load<Vec<T>>(x + i), load<Vec<T>>(y + i)));
  }
  if (i == count) return;
  T last_x[lanes<T>()]{}, last_y[lanes<T>()]{};
  std::copy_n(x + i, count - i, last_x);
  std::copy_n(y + i, count - i, last_y);
  store(last_y, run(load<Vec<T>>(last_x), load<Vec<T>>(last_y)));
  std::copy_n(last_y, count - i, y + i);
}

// e^-|x|, which never overflows.
template <typename T>
inline Vec<T> exp_of_size(const Vec<T>& x) {
  return exp_of_negative<T>(x < T{0} ? x : -x);
}

// x becomes (sigmoid(x) - mean) · scale.
template <typename T>
void normalized_sigmoid(T* x, int64_t count, T mean, T scale) {
  for_each_vector(x, x, count, [&](const Vec<T>& value, const Vec<T>&) {
    const Vec<T> e = exp_of_size<T>(value), one = Vec<T>{} + T{1};
    return ((value < T{0} ? e : one) / (one + e) - mean) * scale;
  });
}

// The gradient of normalized_sigmoid(x) becomes that of x.
template <typename T>
void normalized_sigmoid_backward(const T* x, T* gradient, int64_t count, T scale) {
  for_each_vector(x, gradient, count, [&](const Vec<T>& value, const Vec<T>& grad) {
    const Vec<T> e = exp_of_size<T>(value), sum = T{1} + e;
    return grad * (e / (sum * sum) * scale);
  });
}
