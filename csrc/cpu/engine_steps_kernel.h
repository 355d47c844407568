// The non-GEMM steps of a frozen block on one row; see engine_steps.cpp.

#include "exp_kernel.h"

// x += added + bias, unless they are null. Writes normalized = (x − mean) · rstd and returns rstd.
template <typename X, typename S, typename T = Computed<S>>
T add_normalize(X* __restrict x, const S* __restrict added, const T* __restrict bias, int64_t width,
                double eps, S* __restrict normalized) {
  T sum = 0, squares = 0;
  if (added) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      x[i] = narrow<X>(widen(x[i]) + (widen(added[i]) + bias[i]));
    }
  }
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += widen(x[i]);
  const T mean = sum / static_cast<T>(width);
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < width; ++i) squares += (widen(x[i]) - mean) * (widen(x[i]) - mean);
  const double variance = squares / static_cast<double>(width);
  // An overflow must show: 1/sqrt(inf) would turn it into finite zeros.
  const T rstd = std::isinf(variance) ? std::numeric_limits<T>::quiet_NaN()
                                      : static_cast<T>(1 / std::sqrt(variance + eps));
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) normalized[i] = narrow<S>((widen(x[i]) - mean) * rstd);
  return rstd;
}

// Adds the gradient of x in add_normalize(), where d is the gradient of normalized n:
// gradient += rstd · (d − mean(d) − n · mean(d ∘ n)). Unless it is null, `copy` gets the sum.
template <typename X, typename S, typename T = Computed<S>>
void normalize_backward(X* __restrict gradient, const S* __restrict d,
                        const S* __restrict normalized, T rstd, int64_t width, S* __restrict copy) {
  T sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
  for (int64_t i = 0; i < width; ++i) {
    sum += widen(d[i]);
    product += widen(d[i]) * widen(normalized[i]);
  }
  const T mean = sum / static_cast<T>(width), slope = product / static_cast<T>(width);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const T more = rstd * (widen(d[i]) - mean - widen(normalized[i]) * slope);
    gradient[i] = narrow<X>(widen(gradient[i]) + more);
  }
  if (copy) convert_n(gradient, width, copy);
}

constexpr double kInverseRoot2Pi = 0.3989422804014327, kInverseRoot2 = 0.7071067811865476;

// Φ(x) = erfc(−x/√2) / 2 across vector lanes, accurate to three units in the last place of float32.
// With t = 1 / (1 + p z), erfc(z) e^{z²} is approximated by t times a minimax polynomial in t. Its
// relative error is 1.4e-7 on 0 <= z <= 10.
inline Vec<float> normal_cdf(const Vec<float>& x, const Vec<float>& exp_of_half_square) {
  constexpr float kP = 0.3275911f * static_cast<float>(kInverseRoot2);
  constexpr float kCoefficients[] = {0.18504122f, 0.18088622f,  0.20503331f, 0.027934285f,
                                     0.449015f,   -0.40176812f, 0.49450400f, -0.14064581f};
  const Vec<float> size = x < 0.0f ? -x : x;
  const Vec<float> t = 1.0f / (1.0f + kP * size);
  Vec<float> sum{};
#pragma GCC unroll 8
  for (int k = 7; k >= 0; --k) sum = sum * t + kCoefficients[k];
  const Vec<float> tail = 0.5f * sum * t * exp_of_half_square;
  return x < 0.0f ? tail : 1.0f - tail;
}

inline Vec<double> normal_cdf(const Vec<double>& x, const Vec<double>&) {
  Vec<double> result;
  for (int i = 0; i < lanes<double>(); ++i) result[i] = std::erfc(-x[i] * kInverseRoot2) / 2;
  return result;
}

// Writes one vector of out = gelu(x + bias). x becomes the derivative of gelu at x + bias.
template <typename S, typename T = Computed<S>>
inline void gelu_vector(S* x, const T* bias, S* out) {
  const Vec<T> sum = load_wide(x) + load<Vec<T>>(bias);
  const Vec<T> e = exp_of_negative<T>(sum * sum * static_cast<T>(-0.5));
  const Vec<T> cdf = normal_cdf(sum, e);
  store_narrow(out, sum * cdf);
  store_narrow(x, cdf + sum * e * static_cast<T>(kInverseRoot2Pi));
}

template <typename S, typename T = Computed<S>>
void gelu(S* x, const T* bias, int64_t width, S* out) {
  int64_t i = 0;
  for (; i + lanes<T>() <= width; i += lanes<T>()) gelu_vector(x + i, bias + i, out + i);
  if (i == width) return;
  S last_x[lanes<T>()]{}, last_out[lanes<T>()];
  T last_bias[lanes<T>()]{};
  std::copy_n(x + i, width - i, last_x);
  std::copy_n(bias + i, width - i, last_bias);
  gelu_vector(last_x, last_bias, last_out);
  std::copy_n(last_x, width - i, x + i);
  std::copy_n(last_out, width - i, out + i);
}

template <typename S>
void multiply(S* __restrict x, const S* __restrict factors, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x[i] = narrow<S>(widen(x[i]) * widen(factors[i]));
}
