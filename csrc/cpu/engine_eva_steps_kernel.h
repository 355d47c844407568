// The steps that only blocks of Eva have, on one row; see engine_eva_steps.cpp.

#include "exp_kernel.h"

// out = silu(gate + its bias) · (up + its bias), for one row of x [2F], gate and then up. Gate and
// up become the factors of their gradients: the derivatives of out. With s = σ(g): silu(g) = g s,
// and silu′(g) = s + g s (1 − s).
template <typename S, typename T = Computed<S>>
void swiglu(S* x, const T* bias, int64_t width, S* out) {
  using V = Vec<T>;
  const V zero{}, one = zero + T{1};
  S *gate = x, *up = x + width;
  const T *gate_bias = bias, *up_bias = bias + width;
  for (int64_t i = 0; i < width; i += lanes<T>()) {
    const int64_t n = elements_at<T>(i, width);
    const V g = load_n(gate + i, n) + load_n(gate_bias + i, n);
    const V u = load_n(up + i, n) + load_n(up_bias + i, n);
    const V e = exp_of_negative<T>(g < zero ? g : -g);
    const V larger = one / (one + e);  // σ(|g|)
    const V s = g < zero ? e * larger : larger;
    const V silu = g * s;
    store_n(out + i, silu * u, n);
    store_n(gate + i, u * (s + silu * (one - s)), n);
    store_n(up + i, silu, n);
  }
}

// d_x = [grad ∘ factors of gate, grad ∘ factors of up], for one row.
template <typename S>
void swiglu_backward(const S* __restrict grad, const S* __restrict factors, int64_t width,
                     S* __restrict d_x) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    d_x[i] = narrow<S>(widen(grad[i]) * widen(factors[i]));
    d_x[width + i] = narrow<S>(widen(grad[i]) * widen(factors[width + i]));
  }
}

template <typename S, typename T = Computed<S>>
void add_bias(S* __restrict x, const T* __restrict bias, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x[i] = narrow<S>(widen(x[i]) + bias[i]);
}

// Rotates pairs (a, b) of the channels x [D] of one head by their angles: a cos − b sin and
// b cos + a sin. The pairs are channels i and i + D/2 with `half`, and 2i and 2i + 1 without.
// Backward is the transposed rotation.
template <bool kBackward, typename S, typename T = Computed<S>>
void rotate(S* __restrict x, const T* __restrict sine, const T* __restrict cosine, int64_t width,
            bool half) {
  const int64_t pairs = width / 2, step = half ? 1 : 2, apart = half ? pairs : 1;
#pragma omp simd
  for (int64_t k = 0; k < pairs; ++k) {
    const int64_t i = k * step, j = i + apart;
    const T a = widen(x[i]), b = widen(x[j]);
    x[i] = narrow<S>(kBackward ? a * cosine[i] + b * sine[j] : a * cosine[i] - b * sine[i]);
    x[j] = narrow<S>(kBackward ? b * cosine[j] - a * sine[i] : b * cosine[j] + a * sine[j]);
  }
}
