// Attention of one query of one head, and its gradient; see engine_row_attention.cpp.

template <typename T>
T dot(const T* a, const T* b, int64_t width) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < width; ++d) sum += a[d] * b[d];
  return sum;
}

template <typename T>
void add_scaled(T* __restrict to, T scale, const T* __restrict from, int64_t width) {
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) to[d] += scale * from[d];
}

// Writes the probabilities p [N] = softmax(K q) of a scaled query q, and out [D] = Vᵀ p.
template <typename T>
void attend_row(const KeysAndValues<T>& kv, const T* query, T* p, T* out) {
  for (int64_t j = 0; j < kv.count; ++j) p[j] = dot(query, kv.key(j), kv.width);
  const T highest = *std::max_element(p, p + kv.count);
  T sum = 0;
  for (int64_t j = 0; j < kv.count; ++j) sum += p[j] = std::exp(p[j] - highest);
  std::fill_n(out, kv.width, T{0});
  for (int64_t j = 0; j < kv.count; ++j) add_scaled(out, p[j] /= sum, kv.value(j), kv.width);
}

// Adds the gradients that come from d_out [D] of one query to d_query [D] and d_kv. d_p [N] is
// scratch.
// dP = V dO, dS = p ∘ (dP − p · dP), dq = Kᵀ dS, dK = dS qᵀ, dV = p dOᵀ.
template <typename T>
void attend_row_backward(const KeysAndValues<T>& kv, const T* query, const T* p, const T* d_out,
                         T* d_p, T* d_query, T* d_kv) {
  for (int64_t j = 0; j < kv.count; ++j) d_p[j] = dot(d_out, kv.value(j), kv.width);
  const T mean = dot(p, d_p, kv.count);
  for (int64_t j = 0; j < kv.count; ++j) {
    const T d_score = p[j] * (d_p[j] - mean);
    add_scaled(d_query, d_score, kv.key(j), kv.width);
    add_scaled(d_kv + kv.offset(0, j), d_score, query, kv.width);
    add_scaled(d_kv + kv.offset(1, j), p[j], d_out, kv.width);
  }
}
