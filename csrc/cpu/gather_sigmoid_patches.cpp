#include <utility>

#include "patch_windows.h"
#include "recycled_memory.h"

#define SMI_KERNEL_HEADER "gather_sigmoid_patches_kernel.h"
#define SMI_KERNEL_NAMESPACE gather_sigmoid_patches
#include "isa_dispatch.h"

namespace smi_fast {
namespace {

// Which patches of the un-jittered grid are frozen. Without a mask none is.
class Frozen {
 public:
  Frozen(const std::optional<Tensor>& mask, int64_t width, int64_t size)
      : columns_(width / size), size_(size) {
    if (!mask) return;
    mask_ = as_contiguous(*mask);
    cells_ = mask_->const_data_ptr<bool>();
    per_image_ = mask_->size(1) * columns_;
  }

  // Calls visit(x, count) for each part of the pixels [x, x + count) of a row that is frozen.
  template <typename Visit>
  void for_each_part(int64_t image, int64_t row, int64_t x, int64_t count,
                     const Visit& visit) const {
    if (!cells_) return;
    const bool* cells = cells_ + image * per_image_ + row / size_ * columns_;
    for (int64_t at = x, end; at < x + count; at = end) {
      end = std::min(x + count, (at / size_ + 1) * size_);
      if (cells[at / size_]) visit(at, end - at);
    }
  }

 private:
  int64_t columns_, size_, per_image_ = 0;
  std::optional<Tensor> mask_;
  const bool* cells_ = nullptr;  // [B, H/P, W/P]
};

std::tuple<Tensor, Tensor> gather_sigmoid_patches(const Tensor& field_any, const Tensor& kept,
                                                  const Tensor& shift, const Tensor& flip,
                                                  const Tensor& mean_any, const Tensor& std_any,
                                                  const std::optional<Tensor>& background_any,
                                                  const std::optional<Tensor>& frozen_any,
                                                  int64_t patch_size) {
  const Tensor field = as_contiguous(field_any);
  const Tensor background = background_any ? as_contiguous(*background_any) : field;
  const Tensor mean = as_contiguous(mean_any), std = as_contiguous(std_any);
  const int64_t channels = field.size(1), height = field.size(2), width = field.size(3);
  const Windows windows(kept, shift, flip, height, width, patch_size);
  const Frozen frozen(frozen_any, width, patch_size);
  const int64_t batch = kept.size(0), count = kept.size(1), area = patch_size * patch_size;
  const int64_t length = channels * area, image_size = channels * height * width;
  const Tensor patches = new_result(field, {batch, count, length});
  const Tensor positions = torch::stable::new_empty(kept, {batch, count});
  int64_t* position_data = positions.mutable_data_ptr<int64_t>();  // [B, K]
  with_type_of(field, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = SMI_BEST(normalized_sigmoid<T>);
    const T* field_data = field.const_data_ptr<T>();                             // [B, C, H, W]
    const T* background_data = background.const_data_ptr<T>();                   // [B, C, H, W]
    const T *means = mean.const_data_ptr<T>(), *stds = std.const_data_ptr<T>();  // [C]
    T* patch_data = patches.mutable_data_ptr<T>();                               // [B, K, C, P, P]
    for_each_task(batch * count, length, [&](int64_t i) {
      const Window& window = windows[i];
      position_data[i] = window.cell;
      const int64_t image = i / count, next = std::min(i + 1, batch * count - 1);
      T* patch = patch_data + i * length;
      windows.gather(field_data + image * image_size, channels, i,
                     field_data + next / count * image_size, next, patch);
      for (int64_t channel = 0; channel < channels; ++channel) {
        kernel(patch + channel * area, area, means[channel], 1 / stds[channel]);
      }
      for (int64_t y = 0; y < patch_size; ++y) {
        const int64_t row = windows.below(window.top, y);
        windows.for_each_run(i, [&](const Run& run) {
          frozen.for_each_part(image, row, run.x, run.count, [&](int64_t x, int64_t pixels) {
            // A mirrored part counts from the other end of the run.
            const int64_t before = window.flip ? run.x + run.count - x - pixels : x - run.x;
            const T* from = background_data + image * image_size + row * width + x;
            T* to = patch + y * patch_size + run.offset + before;
            for (int64_t channel = 0; channel < channels; ++channel) {
              window.copy(from + channel * height * width, pixels, to + channel * area);
            }
          });
        });
      }
    });
  });
  return {patches, positions};
}

// The stretches of a row that the runs cover, as column and number of pixels.
std::vector<std::pair<int64_t, int64_t>> covered(const std::vector<Run>& runs) {
  std::vector<std::pair<int64_t, int64_t>> found;
  for (const Run& run : runs) {
    if (found.empty() || found.back().first + found.back().second < run.x) {
      found.emplace_back(run.x, run.count);
    } else {
      found.back().second += run.count;
    }
  }
  return found;
}

Tensor gather_sigmoid_patches_backward(const Tensor& grad_any, const Tensor& field_any,
                                       const Tensor& kept, const Tensor& shift, const Tensor& flip,
                                       const Tensor& std_any,
                                       const std::optional<Tensor>& frozen_any,
                                       int64_t patch_size) {
  const Tensor grad = as_contiguous(grad_any), field = as_contiguous(field_any);
  const Tensor std = as_contiguous(std_any);
  const int64_t channels = field.size(1), height = field.size(2), width = field.size(3);
  const Windows windows(kept, shift, flip, height, width, patch_size);
  const Frozen frozen(frozen_any, width, patch_size);
  const int64_t length = grad.size(2), rows = windows.rows();
  const Tensor result = new_result(field, sizes_of(field));
  with_type_of(grad, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = SMI_BEST(normalized_sigmoid_backward<T>);
    const T* grad_data = grad.const_data_ptr<T>();    // [B, K, C, P, P]
    const T* field_data = field.const_data_ptr<T>();  // [B, C, H, W]
    const T* stds = std.const_data_ptr<T>();          // [C]
    T* result_data = result.mutable_data_ptr<T>();    // [B, C, H, W]
    for_each_task(field.size(0) * rows, channels * patch_size * width, [&](int64_t i) {
      const int64_t image = i / rows, grid_row = i % rows;
      const std::vector<Run> runs = windows.runs(image, grid_row);
      const auto stretches = covered(runs);
      for (int64_t channel = 0; channel < channels; ++channel) {
        const int64_t plane = (image * channels + channel) * height * width;
        for (int64_t y = 0; y < patch_size; ++y) {
          const int64_t row = windows.below(windows.top(image, grid_row), y);
          const T* x = field_data + plane + row * width;
          T* out = result_data + plane + row * width;
          const T* values = grad_data + (channel * patch_size + y) * patch_size;
          windows.scatter_row(runs, values, length, out);
          for (const auto& [start, pixels] : stretches) {
            kernel(x + start, out + start, pixels, 1 / stds[channel]);
          }
          frozen.for_each_part(image, row, 0, width, [&](int64_t start, int64_t pixels) {
            std::fill_n(out + start, pixels, T{0});
          });
        }
      }
    });
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(smi_fast, CPU, m) {
  m.impl("gather_sigmoid_patches", TORCH_BOX(&gather_sigmoid_patches));
  m.impl("gather_sigmoid_patches_backward", TORCH_BOX(&gather_sigmoid_patches_backward));
}

}  // namespace smi_fast
