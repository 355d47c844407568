// The non-GEMM steps of a frozen Vision Transformer block. They work in place or write to buffers
// that smi_fast.engine owns. Every tensor is contiguous.

#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "engine_steps_api.h"

#define SMI_KERNEL_HEADER "engine_steps_kernel.h"
#define SMI_KERNEL_NAMESPACE engine_steps
#include "isa_dispatch.h"

namespace smi_fast {
namespace {

constexpr double kRoot2OverPi = 0.7978845608028654;

// Calls `run` with zeros of the element types of x and y. x may have the type that y is computed
// in.
template <typename Run>
void with_types_of(const Tensor& x, const Tensor& y, const Run& run) {
  with_stored_type_of(y, [&](auto stored) {
    if (x.scalar_type() == y.scalar_type()) return run(stored, stored);
    run(Computed<decltype(stored)>{}, stored);
  });
}

// Slope and cubic coefficient of sigmoid_gelu(). GELU by tanh is one, too:
// (1 + tanh u) / 2 = σ(2u), with u = √(2/π) (y + 0.044715 y³).
std::pair<double, double> sigmoid_of(const std::string& approximate) {
  if (approximate == "tanh") return {2 * kRoot2OverPi, 0.044715};
  STD_TORCH_CHECK(approximate == "sigmoid", "expected approximate none, tanh or sigmoid, got ",
                  approximate);
  return {1.702, 0};
}

}  // namespace

void add_normalize_(Tensor x, const std::optional<Tensor>& added, const std::optional<Tensor>& bias,
                    double eps, Tensor normalized, Tensor rstd, bool centred) {
  const int64_t width = x.size(-1), rows = x.numel() / width;
  STD_TORCH_CHECK(bias || !added, "expected a bias with added, got none");
  with_types_of(x, normalized, [&](auto zero, auto stored) {
    using X = decltype(zero);
    using S = decltype(stored);
    using T = Computed<S>;
    const auto kernel = SMI_BEST_STORING(S, add_normalize<X, S>);
    X* row = data_of<X>(x, rows * width);                                // [rows, D]
    const S* more = added ? data_of<S>(*added, rows * width) : nullptr;  // [rows, D]
    const T* offset = bias ? data_of<T>(*bias, width) : nullptr;         // [D]
    S* to = data_of<S>(normalized, rows * width);                        // [rows, D]
    T* scale = data_of<T>(rstd, rows);                                   // [rows]
    for_each_task(rows, width, [&](int64_t i) {
      scale[i] = kernel(row + i * width, more ? more + i * width : nullptr, offset, width, eps,
                        centred, to + i * width);
    });
  });
}

void normalize_backward_(Tensor gradient, const Tensor& grad, const Tensor& normalized,
                         const Tensor& rstd, const std::optional<Tensor>& copy, bool centred) {
  const int64_t width = gradient.size(-1), rows = gradient.numel() / width;
  with_types_of(gradient, grad, [&](auto zero, auto stored) {
    using X = decltype(zero);
    using S = decltype(stored);
    using T = Computed<S>;
    const auto kernel = SMI_BEST_STORING(S, normalize_backward<X, S>);
    X* row = data_of<X>(gradient, rows * width);                // [rows, D]
    const S* d = data_of<S>(grad, rows * width);                // [rows, D]
    const S* output = data_of<S>(normalized, rows * width);     // [rows, D]
    const T* scale = data_of<T>(rstd, rows);                    // [rows]
    S* sum = copy ? data_of<S>(*copy, rows * width) : nullptr;  // [rows, D]
    for_each_task(rows, width, [&](int64_t i) {
      const int64_t at = i * width;
      kernel(row + at, d + at, output + at, scale[i], width, centred, sum ? sum + at : nullptr);
    });
  });
}

std::tuple<Tensor, Tensor> normalize_inner(const Tensor& x, const std::optional<Tensor>& bias,
                                           double eps, bool centred) {
  const Tensor normalized = torch::stable::empty_like(x);
  const Tensor rstd = torch::stable::new_empty(x, {x.size(0)}, computed_type(x.scalar_type()));
  recorded("smi_fast::add_normalize_", add_normalize_, x, std::nullopt, bias, eps, normalized, rstd,
           centred);
  return {normalized, rstd};
}

Tensor normalize_inner_backward(const Tensor& grad, const Tensor& normalized, const Tensor& rstd,
                                bool centred) {
  const Tensor gradient = torch::stable::new_zeros(grad, grad.sizes());
  recorded("smi_fast::normalize_backward_", normalize_backward_, gradient, grad, normalized, rstd,
           std::nullopt, centred);
  return gradient;
}

void gelu_(Tensor x, const Tensor& bias, Tensor out, const std::string& approximate) {
  const int64_t width = x.size(-1), rows = x.numel() / width;
  with_stored_type_of(x, [&](auto zero) {
    using S = decltype(zero);
    using T = Computed<S>;
    S* row = data_of<S>(x, rows * width);       // [rows, D]
    const T* offset = data_of<T>(bias, width);  // [D]
    S* to = data_of<S>(out, rows * width);      // [rows, D]
    if (approximate == "none") {
      const auto kernel = SMI_BEST_STORING(S, gelu<S>);
      for_each_task(rows, 8 * width,
                    [&](int64_t i) { kernel(row + i * width, offset, width, to + i * width); });
      return;
    }
    const auto kernel = SMI_BEST_STORING(S, sigmoid_gelu<S>);
    const auto [slope, cubic] = sigmoid_of(approximate);
    const T a = static_cast<T>(slope), b = static_cast<T>(cubic);
    for_each_task(rows, 8 * width,
                  [&](int64_t i) { kernel(row + i * width, offset, width, a, b, to + i * width); });
  });
}

void multiply_(Tensor x, const Tensor& factors) {
  const int64_t count = x.numel();
  with_stored_type_of(x, [&](auto zero) {
    using S = decltype(zero);
    const auto kernel = SMI_BEST_STORING(S, multiply<S>);
    S* product = data_of<S>(x, count);
    const S* factor = data_of<S>(factors, count);
    for_each_task(ceil_div(count, kGrain), kGrain, [&](int64_t i) {
      const int64_t at = i * kGrain;
      kernel(product + at, factor + at, std::min(kGrain, count - at));
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(smi_fast, CPU, m) {
  m.impl("add_normalize_", TORCH_BOX(&add_normalize_));
  m.impl("normalize_backward_", TORCH_BOX(&normalize_backward_));
  m.impl("gelu_", TORCH_BOX(&gelu_));
  m.impl("multiply_", TORCH_BOX(&multiply_));
}

}  // namespace smi_fast
