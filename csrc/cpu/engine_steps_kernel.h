// The non-GEMM steps of a frozen block on one row; see engine_steps.cpp.

#include "exp_kernel.h"

template <typename T>
inline T sum_of(const Vec<T>& vector) {
  T sum = 0;
  for (int i = 0; i < lanes<T>(); ++i) sum += vector[i];
  return sum;
}

// x += added + bias, unless they are null. Writes normalized = (x − mean) · rstd and returns rstd.
// The mean counts as 0 unless the norm is centred.
template <typename X, typename S, typename T = Computed<S>>
T add_normalize(X* x, const S* added, const T* bias, int64_t width, double eps, bool centred,
                S* normalized) {
  using V = Vec<T>;
  V sums{}, squares{};
  for (int64_t i = 0; i < width; i += lanes<T>()) {
    const int64_t n = elements_at<T>(i, width);
    V sum = load_n(x + i, n);
    if (bias) {
      const V term = load_n(bias + i, n);
      sum += added ? load_n(added + i, n) + term : term;
      store_n(x + i, sum, n);
    }
    sums += sum;
  }
  const T mean = centred ? sum_of<T>(sums) / static_cast<T>(width) : T{0};
  for (int64_t i = 0; i < width; i += lanes<T>()) {
    const int64_t n = elements_at<T>(i, width);
    const V apart = keep_n<T>(load_n(x + i, n) - mean, n);
    squares += apart * apart;
  }
  const double variance = sum_of<T>(squares) / static_cast<double>(width);
  // An overflow must show: 1/sqrt(inf) would turn it into finite zeros.
  const T rstd = std::isinf(variance) ? std::numeric_limits<T>::quiet_NaN()
                                      : static_cast<T>(1 / std::sqrt(variance + eps));
  for (int64_t i = 0; i < width; i += lanes<T>()) {
    const int64_t n = elements_at<T>(i, width);
    store_n(normalized + i, (load_n(x + i, n) - mean) * rstd, n);
  }
  return rstd;
}

// Adds the gradient of x in add_normalize(), where d is the gradient of normalized n:
// gradient += rstd · (d − mean(d) − n · mean(d ∘ n)), without mean(d) unless the norm is centred.
// Unless it is null, `copy` gets the sum.
template <typename X, typename S, typename T = Computed<S>>
void normalize_backward(X* gradient, const S* d, const S* normalized, T rstd, int64_t width,
                        bool centred, S* copy) {
  using V = Vec<T>;
  V sums{}, products{};
  for (int64_t i = 0; i < width; i += lanes<T>()) {
    const int64_t n = elements_at<T>(i, width);
    const V own = load_n(d + i, n);
    sums += own;
    products += own * load_n(normalized + i, n);
  }
  const T mean = centred ? sum_of<T>(sums) / static_cast<T>(width) : T{0};
  const T slope = sum_of<T>(products) / static_cast<T>(width);
  for (int64_t i = 0; i < width; i += lanes<T>()) {
    const int64_t n = elements_at<T>(i, width);
    const V more = rstd * (load_n(d + i, n) - mean - load_n(normalized + i, n) * slope);
    const V sum = load_n(gradient + i, n) + more;
    store_n(gradient + i, sum, n);
    if (copy) store_n(copy + i, sum, n);
  }
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

// out = gelu(x + bias). x becomes the derivative of gelu at x + bias.
template <typename S, typename T = Computed<S>>
void gelu(S* x, const T* bias, int64_t width, S* out) {
  using V = Vec<T>;
  for (int64_t i = 0; i < width; i += lanes<T>()) {
    const int64_t n = elements_at<T>(i, width);
    const V sum = load_n(x + i, n) + load_n(bias + i, n);
    const V e = exp_of_negative<T>(sum * sum * static_cast<T>(-0.5));
    const V cdf = normal_cdf(sum, e);
    store_n(out + i, sum * cdf, n);
    store_n(x + i, cdf + sum * e * static_cast<T>(kInverseRoot2Pi), n);
  }
}

// out = y σ(v) with y = x + bias and v = slope · y (1 + cubic · y²): GELU approximated by a
// sigmoid. x becomes its derivative at y, σ(v) + y σ(v) (1 − σ(v)) v′.
template <typename S, typename T = Computed<S>>
void sigmoid_gelu(S* x, const T* bias, int64_t width, T slope, T cubic, S* out) {
  using V = Vec<T>;
  const V zero{}, one = zero + T{1};
  for (int64_t i = 0; i < width; i += lanes<T>()) {
    const int64_t n = elements_at<T>(i, width);
    const V y = load_n(x + i, n) + load_n(bias + i, n);
    const V bent = cubic * y * y, v = slope * y * (one + bent);
    const V e = exp_of_negative<T>(v < zero ? v : -v);
    const V larger = one / (one + e);  // σ(|v|)
    const V s = v < zero ? e * larger : larger;
    store_n(out + i, y * s, n);
    store_n(x + i, s + y * e * larger * larger * slope * (one + T{3} * bent), n);
  }
}

template <typename S>
void multiply(S* x, const S* factors, int64_t count) {
  using T = Computed<S>;
  for (int64_t i = 0; i < count; i += lanes<T>()) {
    const int64_t n = elements_at<T>(i, count);
    store_n(x + i, load_n(x + i, n) * load_n(factors + i, n), n);
  }
}
