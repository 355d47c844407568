// The last block, computed only for the first R rows of each image, which are all that the head
// reads. See smi_fast.engine.

#include "engine_products.h"

namespace smi_fast {
namespace {

using torch::stable::empty_like;
using torch::stable::new_empty;
using torch::stable::new_zeros;
using torch::stable::view;

Tensor converted(const Tensor& x, ScalarType type) {
  return x.scalar_type() == type ? x : torch::stable::to(x, type);
}

// x [rows, in] · weightᵀ, with weight [out, in] and x in its type.
Tensor linear(const Tensor& x, const Tensor& weight) {
  return product(converted(x, weight.scalar_type()), torch::stable::transpose(weight, 0, 1));
}

// The gradient of x in linear(), given that of its result.
Tensor linear_backward(const Tensor& gradient, const Tensor& weight) {
  return product(converted(gradient, weight.scalar_type()), weight);
}

// Where the rows of each image begin, and the last ones end; see offsets_of().
using Offsets = std::vector<int64_t>;

int64_t images_of(const Offsets& offsets) { return static_cast<int64_t>(offsets.size()) - 1; }

// Calls run(x, y) for each element x of the first R rows of each image in a [B·N, D], where y is
// the same element of b [B·R, D].
template <typename Run>
void for_each_of_first(const Tensor& a, const Tensor& b, const Offsets& offsets, const Run& run) {
  const int64_t images = images_of(offsets), width = a.size(1);
  const int64_t count = images ? b.numel() / images : 0;
  with_stored_type_of(a, [&](auto zero) {
    using T = decltype(zero);
    T* rows = a.mutable_data_ptr<T>();   // [B·N, D]
    T* first = b.mutable_data_ptr<T>();  // [B, R, D]
    for (int64_t i = 0; i < images; ++i, first += count) {
      T* own = rows + offsets[i] * width;
      for (int64_t j = 0; j < count; ++j) run(own[j], first[j]);
    }
  });
}

// A copy [B·R, D] of the first R rows of each image in x [B·N, D].
Tensor first_of(const Tensor& x, const Offsets& offsets, int64_t rows) {
  const Tensor first = new_empty(x, {images_of(offsets) * rows, x.size(1)});
  for_each_of_first(x, first, offsets, [](const auto& from, auto& to) { to = from; });
  return first;
}

// Adds the terms to `to`, repeating them until its end.
void add(const Tensor& to, const Tensor& terms) {
  const int64_t all = to.numel(), count = terms.numel();
  with_stored_type_of(terms, [&](auto zero) {
    using S = decltype(zero);
    Computed<S>* sums = to.mutable_data_ptr<Computed<S>>();
    const S* values = terms.const_data_ptr<S>();
    for (int64_t i = 0; i < all; i += count) {
      for (int64_t j = 0; j < count; ++j) sums[i + j] += values[j];
    }
  });
}

// The weights by name, in the order of the list from smi_fast.engine.
struct Weights {
  const Tensor &to_q, &to_kv, &proj, &fc1, &fc2, &q_bias, &proj_bias, &fc1_bias, &fc2_bias;
  const Tensor* k_bias;  // with rotary positions
  const Tensor* v_bias;  // with a norm in front of proj

  Weights(const std::vector<Tensor>& w, bool rotary)
      : to_q(w.at(0)),
        to_kv(w.at(1)),
        proj(w.at(2)),
        fc1(w.at(3)),
        fc2(w.at(4)),
        q_bias(w.at(5)),
        proj_bias(w.at(6)),
        fc1_bias(w.at(7)),
        fc2_bias(w.at(8)),
        k_bias(rotary ? &w.at(9) : nullptr),
        v_bias(w.size() > (rotary ? 10 : 9) ? &w.back() : nullptr) {}

  // Whether the MLP has SwiGLU in place of GELU.
  bool gated() const { return fc1.size(0) == 2 * fc2.size(1); }
};

// For tokens [B, N, D], or [1, N, D] of several images that begin at given offsets, returns in this
// order:
// - the first R rows [B, R, D] after the block;
// - their attention probabilities [B, H, R, N], or [1, H, R, N] of concatenated images;
// - for backward: normalized and rstd of the norm before attention, q, kv, normalized and rstd of
//   the norm before the MLP, the derivatives of GELU or SwiGLU, and normalized and rstd of a norm
//   in front of proj and of one in front of fc2, which a v_bias and one more eps ask for.
// Norms are LayerNorm, or RMSNorm unless `centred`. GELU may be approximated, see gelu_().
// A rotation turns the keys of patches. The first R rows are prefix tokens, which have none.
// Only what products read and write has the type of the weights; attention is short enough to
// read it converted.
std::vector<Tensor> run(const Tensor& tokens_any, const std::vector<Tensor>& weights,
                        const std::vector<double>& eps, int64_t heads, int64_t rows,
                        const Tensor* rotation, bool half, const std::optional<Tensor>& given,
                        bool centred, const std::string& approximate) {
  const Weights w(weights, rotation != nullptr);
  const Tensor tokens = as_contiguous(tokens_any);
  const Offsets offsets = offsets_of(tokens, given);
  const int64_t images = images_of(offsets), all = offsets.back(), width = tokens.size(2);
  for (int64_t i = 0; i < images; ++i) {
    STD_TORCH_CHECK(offsets[i + 1] - offsets[i] >= rows, "expected at least ", rows,
                    " tokens in each image, got ", offsets[i + 1] - offsets[i]);
  }
  const int64_t attention = w.q_bias.numel();
  const ScalarType stored = w.fc1.scalar_type(), type = tokens.scalar_type();
  const std::optional<Tensor> nothing;
  const Tensor x = view(tokens, {all, width});

  const Tensor normalized = new_empty(x, {all, width}, stored);
  const Tensor rstd = new_empty(x, {all});
  recorded("smi_fast::add_normalize_", add_normalize_, x, nothing, nothing, eps.at(0), normalized,
           rstd, centred);
  const Tensor q = view(converted(linear(first_of(normalized, offsets, rows), w.to_q), type),
                        {images, rows, attention});
  const Tensor kv = view(converted(linear(normalized, w.to_kv), type),
                         {tokens.size(0), tokens.size(1), 2, heads, attention / heads});
  if (rotation) recorded("smi_fast::rotate_", rotate_, kv, *w.k_bias, *rotation, half);
  const auto [attended, probabilities] =
      recorded("smi_fast::attend_rows", attend_rows, q, w.q_bias, kv, given);

  std::vector<Tensor> inner;  // what norms inside of attention and of the MLP save
  const auto normed = [&](const Tensor& own, const std::optional<Tensor>& bias, double own_eps) {
    const auto [normal, scale] = normalize_inner(own, bias, own_eps, centred);
    inner.insert(inner.end(), {normal, scale});
    return normal;
  };
  const Tensor y = first_of(x, offsets, rows);
  const Tensor attended_rows = view(attended, {images * rows, attention});
  const Tensor added =
      linear(w.v_bias ? normed(attended_rows, *w.v_bias, eps.at(2)) : attended_rows, w.proj);
  const Tensor to_mlp = new_empty(y, {images * rows, width}, stored);
  const Tensor mlp_rstd = new_empty(y, {images * rows});
  recorded("smi_fast::add_normalize_", add_normalize_, y, std::optional(added),
           std::optional(w.proj_bias), eps.at(1), to_mlp, mlp_rstd, centred);
  const Tensor derivative = linear(to_mlp, w.fc1);
  const Tensor hidden = new_empty(derivative, {images * rows, w.fc2.size(1)});
  if (w.gated()) {
    recorded("smi_fast::swiglu_", swiglu_, derivative, w.fc1_bias, hidden);
  } else {
    recorded("smi_fast::gelu_", gelu_, derivative, w.fc1_bias, hidden, approximate);
  }
  const bool has_mlp_norm = eps.size() > (w.v_bias ? 3 : 2);
  add(y, linear(has_mlp_norm ? normed(hidden, std::nullopt, eps.back()) : hidden, w.fc2));
  add(y, w.fc2_bias);
  std::vector<Tensor> result{view(y, {images, rows, width}),
                             probabilities,
                             normalized,
                             rstd,
                             q,
                             kv,
                             to_mlp,
                             mlp_rstd,
                             derivative};
  result.insert(result.end(), inner.begin(), inner.end());
  return result;
}

// The gradient of fc1's output, given that of the hidden layer and what run() saved.
Tensor activate_backward(const Weights& w, const Tensor& d_hidden, const Tensor& derivative) {
  if (!w.gated()) {
    recorded("smi_fast::multiply_", multiply_, d_hidden, derivative);
    return d_hidden;
  }
  const Tensor d_x = empty_like(derivative);
  recorded("smi_fast::swiglu_backward_", swiglu_backward_, d_hidden, derivative, d_x);
  return d_x;
}

// Gradient of the tokens, in their shape, given that of their first R rows after the block. `saved`
// is the result of run() without its first tensor.
Tensor run_backward(const Tensor& grad_any, const std::vector<Tensor>& weights,
                    const std::vector<Tensor>& saved, const Tensor* rotation, bool half,
                    const std::optional<Tensor>& given, bool centred) {
  const Weights w(weights, rotation != nullptr);
  const Tensor &probabilities = saved.at(0), &normalized = saved.at(1), &rstd = saved.at(2);
  const Tensor &q = saved.at(3), &kv = saved.at(4), &to_mlp = saved.at(5);
  const Tensor &mlp_rstd = saved.at(6), &derivative = saved.at(7);
  const Offsets offsets = offsets_of(kv, given);
  const int64_t width = normalized.size(1), attention = w.q_bias.numel();

  const Tensor gradient =
      view(torch::stable::clone(as_contiguous(grad_any)), {q.size(0) * q.size(1), width});
  Tensor d_hidden = linear_backward(gradient, w.fc2);
  const size_t count = saved.size();
  if (count > (w.v_bias ? 10 : 8)) {
    d_hidden = normalize_inner_backward(d_hidden, saved[count - 2], saved[count - 1], centred);
  }
  const Tensor d_fc1 = activate_backward(w, d_hidden, derivative);
  recorded("smi_fast::normalize_backward_", normalize_backward_, gradient,
           linear_backward(d_fc1, w.fc1), to_mlp, mlp_rstd, std::nullopt, centred);
  Tensor d_attended = converted(linear_backward(gradient, w.proj), q.scalar_type());
  if (w.v_bias) d_attended = normalize_inner_backward(d_attended, saved[8], saved[9], centred);
  d_attended = view(d_attended, q.sizes());
  const auto [d_q, d_kv] = recorded("smi_fast::attend_rows_backward", attend_rows_backward,
                                    d_attended, q, w.q_bias, kv, probabilities, given);
  if (rotation) {
    recorded("smi_fast::rotate_backward_", rotate_backward_, d_kv, 1, *rotation, half);
  }

  const Tensor d_normalized = linear_backward(view(d_kv, {-1, 2 * attention}), w.to_kv);
  for_each_of_first(d_normalized, linear_backward(view(d_q, {-1, attention}), w.to_q), offsets,
                    [](auto& sum, const auto& term) { sum += term; });
  const Tensor result = new_zeros(gradient, normalized.sizes());
  for_each_of_first(result, gradient, offsets, [](auto& to, const auto& from) { to = from; });
  recorded("smi_fast::normalize_backward_", normalize_backward_, result, d_normalized, normalized,
           rstd, std::nullopt, centred);
  return view(result, {kv.size(0), kv.size(1), width});
}

std::vector<Tensor> last_block_rows(const Tensor& tokens, const std::vector<Tensor>& weights,
                                    const std::vector<double>& eps, int64_t heads, int64_t rows,
                                    const std::optional<Tensor>& offsets, bool centred,
                                    const std::string& approximate) {
  return run(tokens, weights, eps, heads, rows, nullptr, false, offsets, centred, approximate);
}

Tensor last_block_rows_backward(const Tensor& grad, const std::vector<Tensor>& weights,
                                const std::vector<Tensor>& saved,
                                const std::optional<Tensor>& offsets, bool centred) {
  return run_backward(grad, weights, saved, nullptr, false, offsets, centred);
}

// The same with rotary positions.
std::vector<Tensor> last_rotary_block_rows(const Tensor& tokens, const std::vector<Tensor>& weights,
                                           const std::vector<double>& eps, int64_t heads,
                                           int64_t rows, const Tensor& rotation, bool half,
                                           bool centred, const std::string& approximate) {
  return run(tokens, weights, eps, heads, rows, &rotation, half, std::nullopt, centred,
             approximate);
}

Tensor last_rotary_block_rows_backward(const Tensor& grad, const std::vector<Tensor>& weights,
                                       const std::vector<Tensor>& saved, const Tensor& rotation,
                                       bool half, bool centred) {
  return run_backward(grad, weights, saved, &rotation, half, std::nullopt, centred);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(smi_fast, CPU, m) {
  m.impl("last_block_rows", TORCH_BOX(&last_block_rows));
  m.impl("last_block_rows_backward", TORCH_BOX(&last_block_rows_backward));
  m.impl("last_rotary_block_rows", TORCH_BOX(&last_rotary_block_rows));
  m.impl("last_rotary_block_rows_backward", TORCH_BOX(&last_rotary_block_rows_backward));
}

}  // namespace smi_fast
