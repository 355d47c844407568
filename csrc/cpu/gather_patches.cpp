#include "patch_windows.h"
#include "recycled_memory.h"

namespace smi_fast {
namespace {

std::tuple<Tensor, Tensor> gather_patches(const Tensor& images_any, const Tensor& kept,
                                          const Tensor& shift, const Tensor& flip,
                                          int64_t patch_size) {
  const Tensor images = as_contiguous(images_any);
  const int64_t channels = images.size(1), height = images.size(2), width = images.size(3);
  const Windows windows(kept, shift, flip, height, width, patch_size);
  const int64_t batch = kept.size(0), count = kept.size(1);
  const int64_t length = channels * patch_size * patch_size;
  const Tensor patches = new_result(images, {batch, count, length});
  const Tensor positions = torch::stable::new_empty(kept, {batch, count});
  int64_t* position_data = positions.mutable_data_ptr<int64_t>();  // [B, K]
  with_type_of(images, [&](auto zero) {
    using T = decltype(zero);
    const T* image_data = images.const_data_ptr<T>();  // [B, C, H, W]
    T* patch_data = patches.mutable_data_ptr<T>();     // [B, K, C, P, P]
    const int64_t image_size = channels * height * width;
    for_each_task(batch * count, length, [&](int64_t i) {
      position_data[i] = windows[i].cell;
      const int64_t next = std::min(i + 1, batch * count - 1);
      windows.gather(image_data + i / count * image_size, channels, i,
                     image_data + next / count * image_size, next, patch_data + i * length);
    });
  });
  return {patches, positions};
}

Tensor gather_patches_backward(const Tensor& grad_any, const Tensor& kept, const Tensor& shift,
                               const Tensor& flip, int64_t patch_size, int64_t height,
                               int64_t width) {
  const Tensor grad = as_contiguous(grad_any);
  const Windows windows(kept, shift, flip, height, width, patch_size);
  const int64_t batch = kept.size(0), length = grad.size(2);
  const int64_t channels = length / (patch_size * patch_size), rows = windows.rows();
  const Tensor images = new_result(grad, {batch, channels, height, width});
  with_type_of(grad, [&](auto zero) {
    using T = decltype(zero);
    const T* grad_data = grad.const_data_ptr<T>();  // [B, K, C, P, P]
    T* image_data = images.mutable_data_ptr<T>();   // [B, C, H, W]
    // Each pixel is written once, row by row. Pixels between windows become zero.
    for_each_task(batch * rows, channels * patch_size * width, [&](int64_t i) {
      const int64_t image = i / rows, grid_row = i % rows;
      const std::vector<Run> runs = windows.runs(image, grid_row);
      for (int64_t channel = 0; channel < channels; ++channel) {
        T* plane = image_data + (image * channels + channel) * height * width;
        for (int64_t y = 0; y < patch_size; ++y) {
          T* row = plane + windows.below(windows.top(image, grid_row), y) * width;
          const T* values = grad_data + (channel * patch_size + y) * patch_size;
          windows.scatter_row(runs, values, length, row);
        }
      }
    });
  });
  return images;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(smi_fast, CPU, m) {
  m.impl("gather_patches", TORCH_BOX(&gather_patches));
  m.impl("gather_patches_backward", TORCH_BOX(&gather_patches_backward));
}

}  // namespace smi_fast
