// The steps that only blocks of Eva have, on one row; see engine_eva_steps.cpp.

#include "exp_kernel.h"

// Writes one vector of out = silu(gate + its bias) · (up + its bias). Gate and up become the
// factors of their gradients: the derivatives of out. With s = σ(g): silu(g) = g s, and silu′(g) =
// s + g s (1 − s).
template <typename S, typename T = Computed<S>>
inline void swiglu_vector(S* gate, S* up, const T* gate_bias, const T* up_bias, S* out) {
  const Vec<T> zero{}, one = zero + T{1};
  const Vec<T> g = load_wide(gate) + load<Vec<T>>(gate_bias);
  const Vec<T> u = load_wide(up) + load<Vec<T>>(up_bias);
  const Vec<T> e = exp_of_negative<T>(g < zero ? g : -g);
  const Vec<T> larger = one / (one + e);  // σ(|g|)
  const Vec<T> s = g < zero ? e * larger : larger;
  const Vec<T> silu = g * s;
  store_narrow(out, silu * u);
  store_narrow(gate, u * (s + silu * (one - s)));
  store_narrow(up, silu);
}

// One row of x [2F], gate and then up, with its bias [2F].
template <typename S, typename T = Computed<S>>
void swiglu(S* x, const T* bias, int64_t width, S* out) {
  int64_t i = 0;
  for (; i + lanes<T>() <= width; i += lanes<T>()) {
    swiglu_vector(x + i, x + width + i, bias + i, bias + width + i, out + i);
  }
  const int64_t left = width - i;
  if (left == 0) return;
  S last[3][lanes<T>()]{};  // gate, up, and out
  T last_bias[2][lanes<T>()]{};
  std::copy_n(x + i, left, last[0]);
  std::copy_n(x + width + i, left, last[1]);
  std::copy_n(bias + i, left, last_bias[0]);
  std::copy_n(bias + width + i, left, last_bias[1]);
  swiglu_vector(last[0], last[1], last_bias[0], last_bias[1], last[2]);
  std::copy_n(last[0], left, x + i);
  std::copy_n(last[1], left, x + width + i);
  std::copy_n(last[2], left, out + i);
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
