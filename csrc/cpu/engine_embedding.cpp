// From patches of pixels to the tokens in front of the first block; see smi_fast.engine.

#include "engine_products.h"

namespace smi_fast {
namespace {

using torch::stable::new_empty;
using torch::stable::view;

// Tokens [B, P + K, D]: the prefix [1, P, D], and behind it patches [B, K, I] · weightᵀ with weight
// [D, I], plus the bias [D], plus the row of the table [N, D] at each position [B, K].
Tensor embed_patches(const Tensor& patches_any, const Tensor& weight,
                     const std::optional<Tensor>& bias_any, const Tensor& prefix_any,
                     const std::optional<Tensor>& table_any, const Tensor& positions_any) {
  const Tensor patches = as_contiguous(patches_any), prefix = as_contiguous(prefix_any);
  const int64_t batch = patches.size(0), kept = patches.size(1), first = prefix.size(1);
  const int64_t width = weight.size(0), rows = first + kept;
  std::optional<Tensor> bias, table;
  if (bias_any) bias = as_contiguous(*bias_any);
  if (table_any) table = as_contiguous(*table_any);
  const Tensor positions =
      table ? checked_indices("positions", positions_any, table->size(0)) : positions_any;
  const Tensor embedded = product(view(patches, {batch * kept, patches.size(2)}),
                                  torch::stable::transpose(weight, 0, 1));
  const Tensor tokens = new_empty(patches, {batch, rows, width});
  with_type_of(patches, [&](auto zero) {
    using T = decltype(zero);
    const T* products = embedded.const_data_ptr<T>();  // [B, K, D]
    const T* prefixes = prefix.const_data_ptr<T>();    // [P, D]
    const T* biases = bias ? bias->const_data_ptr<T>() : nullptr;
    const T* places = table ? table->const_data_ptr<T>() : nullptr;  // [N, D]
    const int64_t* at = table ? positions.const_data_ptr<int64_t>() : nullptr;
    T* out = tokens.mutable_data_ptr<T>();
    for_each_task(batch * rows, width, [&](int64_t i) {
      T* to = out + i * width;
      const int64_t row = i % rows, token = i / rows * kept + row - first;
      std::copy_n(row < first ? prefixes + row * width : products + token * width, width, to);
      if (row < first) return;
      const auto add = [&](const T* terms) {
        for (int64_t j = 0; j < width; ++j) to[j] += terms[j];
      };
      if (biases) add(biases);
      if (places) add(places + at[token] * width);
    });
  });
  return tokens;
}

// The gradient [B, K, I] of the patches, given that of the tokens [B, P + K, D].
Tensor embed_patches_backward(const Tensor& grad_any, const Tensor& weight, int64_t first) {
  const Tensor grad = as_contiguous(grad_any);
  const int64_t batch = grad.size(0), kept = grad.size(1) - first, width = grad.size(2);
  const Tensor of_patches = new_empty(grad, {batch * kept, width});
  with_type_of(grad, [&](auto zero) {
    using T = decltype(zero);
    const T* from = grad.const_data_ptr<T>();
    T* to = of_patches.mutable_data_ptr<T>();
    for_each_task(batch, kept * width, [&](int64_t i) {
      std::copy_n(from + (i * (kept + first) + first) * width, kept * width, to + i * kept * width);
    });
  });
  return view(product(of_patches, weight), {batch, kept, weight.size(1)});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(smi_fast, CPU, m) {
  m.impl("embed_patches", TORCH_BOX(&embed_patches));
  m.impl("embed_patches_backward", TORCH_BOX(&embed_patches_backward));
}

}  // namespace smi_fast
