#include <cmath>

#include "common.h"

namespace smi_fast {

// Scalars of one Adam step, computed in double and rounded once.
template <typename T>
struct AdamStep {
  T to_mean, keep_square, to_square, keep_pixel, rate, root, eps;

  AdamStep(int64_t step, double lr, double beta1, double beta2, double weight_decay)
      : to_mean(static_cast<T>(1 - beta1)),
        keep_square(static_cast<T>(beta2)),
        to_square(static_cast<T>(1 - beta2)),
        keep_pixel(static_cast<T>(1 - lr * weight_decay)),
        rate(static_cast<T>(lr / (1 - std::pow(beta1, step)))),
        root(static_cast<T>(1 / std::sqrt(1 - std::pow(beta2, step)))),
        eps(static_cast<T>(1e-8)) {}
};

}  // namespace smi_fast

#define SMI_KERNEL_HEADER "adam_clamp_kernel.h"
#define SMI_KERNEL_NAMESPACE adam_clamp
#include "isa_dispatch.h"

namespace smi_fast {
namespace {

template <typename T>
void run(const Tensor& images, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
         const AdamStep<T>& step, const Tensor& low, const Tensor& high,
         const std::optional<Tensor>& active, int64_t patch_size) {
  const auto kernel = SMI_BEST(adam_clamp<T>);
  const int64_t batch = images.size(0), channels = images.size(1), width = images.size(3);
  const int64_t plane = images.size(2) * width;
  T* p = images.mutable_data_ptr<T>();          // [B, C, H, W]
  const T* g = grad.const_data_ptr<T>();        // [B, C, H, W]
  T* m = exp_avg.mutable_data_ptr<T>();         // [B, C, H, W]
  T* v = exp_avg_sq.mutable_data_ptr<T>();      // [B, C, H, W]
  const T* lowest = low.const_data_ptr<T>();    // [C]
  const T* highest = high.const_data_ptr<T>();  // [C]
  if (!active) {
    const int64_t block = std::min(kGrain, plane), blocks = plane ? ceil_div(plane, block) : 0;
    for_each_task(batch * channels * blocks, block, [&](int64_t i) {
      const int64_t channel = i / blocks % channels, start = i % blocks * block;
      const int64_t at = i / blocks * plane + start;
      kernel(p + at, g + at, m + at, v + at, 1, std::min(block, plane - start), 0, 0, step,
             lowest[channel], highest[channel]);
    });
    return;
  }
  const int64_t* patches = active->const_data_ptr<int64_t>();  // [B, K]
  const int64_t count = active->size(1), columns = width / patch_size;
  const auto start = [&](int64_t i, int64_t channel) {
    const int64_t row = patches[i] / columns, column = patches[i] % columns;
    return (i / count * channels + channel) * plane + (row * width + column) * patch_size;
  };
  for_each_task(batch * count, channels * patch_size * patch_size, [&](int64_t i) {
    for (int64_t channel = 0; channel < channels; ++channel) {
      // Rows of a patch lie too far apart for the hardware prefetcher.
      const int64_t at = start(i, channel);
      const int64_t next = channel + 1 < channels  ? start(i, channel + 1)
                           : i + 1 < batch * count ? start(i + 1, 0)
                                                   : at;
      kernel(p + at, g + at, m + at, v + at, patch_size, patch_size, width, next - at, step,
             lowest[channel], highest[channel]);
    }
  });
}

void adam_clamp_(Tensor images, const Tensor& grad, Tensor exp_avg, Tensor exp_avg_sq,
                 const Tensor& step, const Tensor& lr, double beta1, double beta2,
                 double weight_decay, const Tensor& low, const Tensor& high,
                 const std::optional<Tensor>& active_any, int64_t patch_size) {
  std::optional<Tensor> active;
  if (active_any) {
    active = checked_indices("active", *active_any,
                             (images.size(2) / patch_size) * (images.size(3) / patch_size));
  }
  const Tensor p = as_contiguous(images), m = as_contiguous(exp_avg), v = as_contiguous(exp_avg_sq);
  with_type_of(images, [&](auto zero) {
    using T = decltype(zero);
    run<T>(p, as_contiguous(grad), m, v,
           AdamStep<T>(*step.const_data_ptr<int64_t>(), *lr.const_data_ptr<double>(), beta1, beta2,
                       weight_decay),
           as_contiguous(low), as_contiguous(high), active, patch_size);
  });
  if (!images.is_contiguous()) torch::stable::copy_(images, p);
  if (!exp_avg.is_contiguous()) torch::stable::copy_(exp_avg, m);
  if (!exp_avg_sq.is_contiguous()) torch::stable::copy_(exp_avg_sq, v);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(smi_fast, CPU, m) { m.impl("adam_clamp_", TORCH_BOX(&adam_clamp_)); }

}  // namespace smi_fast
