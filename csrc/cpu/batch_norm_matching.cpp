#include <cmath>

#include "recycled_memory.h"

namespace smi_fast {

// Count, mean and sum of squared deviations of a sample. Two samples are merged as in Chan, Golub
// and LeVeque, 1979.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  void add(const Moments& other) {
    const double total = count + other.count, distance = other.mean - mean;
    mean += distance * other.count / total;
    squares += other.squares + distance * distance * count * other.count / total;
    count = total;
  }
};

}  // namespace smi_fast

#define SMI_KERNEL_HEADER "batch_norm_matching_kernel.h"
#define SMI_KERNEL_NAMESPACE batch_norm_matching
#include "isa_dispatch.h"

namespace smi_fast {
namespace {

// weight / √(running_var + eps) for each channel.
template <typename T>
std::vector<T> scales(const Tensor& weight_any, const Tensor& running_var_any, double eps) {
  const Tensor weight = as_contiguous(weight_any), running_var = as_contiguous(running_var_any);
  const T* w = weight.const_data_ptr<T>();         // [C]
  const T* var = running_var.const_data_ptr<T>();  // [C]
  std::vector<T> result(weight.numel());
  for (size_t c = 0; c < result.size(); ++c) {
    result[c] = static_cast<T>(w[c] / std::sqrt(static_cast<double>(var[c]) + eps));
  }
  return result;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_matching(const Tensor& x_any,
                                                       const Tensor& running_mean_any,
                                                       const Tensor& running_var,
                                                       const Tensor& weight, const Tensor& bias_any,
                                                       double eps) {
  const Tensor x = as_contiguous(x_any), bias = as_contiguous(bias_any);
  const Tensor running_mean = as_contiguous(running_mean_any);
  const int64_t batch = x.size(0), channels = x.size(1), plane = x.size(2) * x.size(3);
  const Tensor y = new_result(x, sizes_of(x));
  const Tensor mean = torch::stable::new_empty(x, {channels});
  const Tensor var = torch::stable::new_empty(x, {channels});
  with_type_of(x, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = SMI_BEST(normalize_plane<T>);
    const std::vector<T> scale = scales<T>(weight, running_var, eps);
    const T* x_data = x.const_data_ptr<T>();             // [B, C, H, W]
    const T* shift = bias.const_data_ptr<T>();           // [C]
    const T* centre = running_mean.const_data_ptr<T>();  // [C]
    T* y_data = y.mutable_data_ptr<T>();                 // [B, C, H, W]
    T* mean_data = mean.mutable_data_ptr<T>();           // [C]
    T* var_data = var.mutable_data_ptr<T>();             // [C]
    std::vector<Moments> plane_moments(batch * channels);
    for_each_task(batch * channels, plane, [&](int64_t i) {
      const int64_t c = i % channels;
      const T offset = shift[c] - centre[c] * scale[c];
      plane_moments[i] = kernel(x_data + i * plane, y_data + i * plane, plane, scale[c], offset);
    });
    for (int64_t c = 0; c < channels; ++c) {
      Moments total;
      for (int64_t b = 0; b < batch; ++b) total.add(plane_moments[b * channels + c]);
      mean_data[c] = static_cast<T>(total.mean);
      var_data[c] = static_cast<T>(total.squares / total.count);
    }
  });
  return {y, mean, var};
}

Tensor batch_norm_matching_backward(const Tensor& grad_any, const Tensor& x_any,
                                    const Tensor& running_var, const Tensor& weight, double eps,
                                    const Tensor& offset_any, const Tensor& slope_any) {
  const Tensor grad = as_contiguous(grad_any), x = as_contiguous(x_any);
  const Tensor offset = as_contiguous(offset_any), slope = as_contiguous(slope_any);
  const int64_t channels = x.size(1), plane = x.size(2) * x.size(3);
  const Tensor result = new_result(x, sizes_of(x));
  with_type_of(x, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = SMI_BEST(normalize_plane_backward<T>);
    const std::vector<T> scale = scales<T>(weight, running_var, eps);
    const T* grad_data = grad.const_data_ptr<T>();      // [B, C, H, W]
    const T* x_data = x.const_data_ptr<T>();            // [B, C, H, W]
    const T* offset_data = offset.const_data_ptr<T>();  // [C]
    const T* slope_data = slope.const_data_ptr<T>();    // [C]
    T* dx = result.mutable_data_ptr<T>();               // [B, C, H, W]
    for_each_task(x.size(0) * channels, plane, [&](int64_t i) {
      const int64_t c = i % channels, at = i * plane;
      kernel(grad_data + at, x_data + at, dx + at, plane, scale[c], offset_data[c], slope_data[c]);
    });
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(smi_fast, CPU, m) {
  m.impl("batch_norm_matching", TORCH_BOX(&batch_norm_matching));
  m.impl("batch_norm_matching_backward", TORCH_BOX(&batch_norm_matching_backward));
}

}  // namespace smi_fast
