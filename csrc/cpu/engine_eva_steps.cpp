// The steps of a block that timm's Eva has beside those in engine_steps.cpp: rotary positions, and
// the gate of SwiGLU. Every tensor is contiguous.

#include <cmath>

#include "engine_steps_api.h"

#define SMI_KERNEL_HEADER "engine_eva_steps_kernel.h"
#define SMI_KERNEL_NAMESPACE engine_eva_steps
#include "isa_dispatch.h"

namespace smi_fast {
namespace {

// Calls run(first channel, rotation) for the heads of the first parts of each token of
// x [B, N, parts, H, D] that is a patch. The patches are the last K tokens, and the rotation
// [2D], sines and then cosines, is theirs in rotation [B, K, 1 or H, 2D].
template <typename S, typename Run>
void for_each_patch(const Tensor& x, int64_t parts, const Tensor& rotation, const Run& run) {
  using T = Computed<S>;
  const int64_t tokens = x.size(1), all_parts = x.size(2), heads = x.size(3), width = x.size(4);
  const int64_t patches = rotation.size(1), own = rotation.size(2);
  STD_TORCH_CHECK(rotation.size(0) == x.size(0) && patches <= tokens && parts <= all_parts &&
                      (own == 1 || own == heads) && rotation.size(3) == 2 * width,
                  "expected rotation [B, K, 1 or H, 2D] for x [B, N, parts, H, D]");
  S* data = data_of<S>(x, x.numel());
  const T* angles = data_of<T>(rotation, rotation.numel());
  for_each_task(x.size(0) * patches, parts * heads * width, [&](int64_t task) {
    const int64_t image = task / patches, patch = task % patches;
    S* token = data + (image * tokens + tokens - patches + patch) * all_parts * heads * width;
    for (int64_t i = 0; i < parts * heads; ++i) {
      run(token + i * width, angles + (task * own + (own == 1 ? 0 : i % heads)) * 2 * width);
    }
  });
}

}  // namespace

void rotate_(Tensor x, const Tensor& bias, const Tensor& rotation, bool half) {
  const int64_t count = bias.numel(), width = x.size(4), row = x.size(2) * x.size(3) * width;
  const int64_t parts = count / (x.size(3) * width), tokens = x.size(0) * x.size(1);
  with_stored_type_of(x, [&](auto zero) {
    using S = decltype(zero);
    using T = Computed<S>;
    const auto add = SMI_BEST_STORING(S, add_bias<S>);
    const auto kernel = SMI_BEST_STORING(S, rotate<false, S>);
    S* data = data_of<S>(x, tokens * row);      // [B, N, parts, H, D]
    const T* offset = data_of<T>(bias, count);  // [parts to rotate, H, D]
    STD_TORCH_CHECK(count <= row, "expected a bias of at most ", row, " elements, got ", count);
    for_each_task(tokens, count, [&](int64_t i) { add(data + i * row, offset, count); });
    for_each_patch<S>(x, parts, rotation, [&](S* channels, const T* angles) {
      kernel(channels, angles, angles + width, width, half);
    });
  });
}

void rotate_backward_(Tensor gradient, int64_t parts, const Tensor& rotation, bool half) {
  const int64_t width = gradient.size(4);
  with_stored_type_of(gradient, [&](auto zero) {
    using S = decltype(zero);
    const auto kernel = SMI_BEST_STORING(S, rotate<true, S>);
    for_each_patch<S>(gradient, parts, rotation, [&](S* channels, const Computed<S>* angles) {
      kernel(channels, angles, angles + width, width, half);
    });
  });
}

void swiglu_(Tensor x, const Tensor& bias, Tensor out) {
  const int64_t width = out.size(-1), rows = out.numel() / std::max<int64_t>(1, width);
  with_stored_type_of(x, [&](auto zero) {
    using S = decltype(zero);
    const auto kernel = SMI_BEST_STORING(S, swiglu<S>);
    S* row = data_of<S>(x, rows * 2 * width);                           // [rows, 2F]
    const Computed<S>* offset = data_of<Computed<S>>(bias, 2 * width);  // [2F]
    S* to = data_of<S>(out, rows * width);                              // [rows, F]
    for_each_task(rows, 8 * width,
                  [&](int64_t i) { kernel(row + i * 2 * width, offset, width, to + i * width); });
  });
}

void swiglu_backward_(const Tensor& grad, const Tensor& factors, Tensor d_x) {
  const int64_t width = grad.size(-1), rows = grad.numel() / std::max<int64_t>(1, width);
  with_stored_type_of(grad, [&](auto zero) {
    using S = decltype(zero);
    const auto kernel = SMI_BEST_STORING(S, swiglu_backward<S>);
    const S* d = data_of<S>(grad, rows * width);              // [rows, F]
    const S* factor = data_of<S>(factors, rows * 2 * width);  // [rows, 2F]
    S* to = data_of<S>(d_x, rows * 2 * width);                // [rows, 2F]
    for_each_task(rows, 2 * width, [&](int64_t i) {
      kernel(d + i * width, factor + i * 2 * width, width, to + i * 2 * width);
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(smi_fast, CPU, m) {
  m.impl("rotate_", TORCH_BOX(&rotate_));
  m.impl("rotate_backward_", TORCH_BOX(&rotate_backward_));
  m.impl("swiglu_", TORCH_BOX(&swiglu_));
  m.impl("swiglu_backward_", TORCH_BOX(&swiglu_backward_));
}

}  // namespace smi_fast
