#include <cmath>
#include <numeric>
#include <utility>

#include "recycled_memory.h"
#include "total_variation_cells.h"

namespace smi_fast {

// Sums over the differences in one direction.
struct Sums {
  double absolute = 0, squares = 0, count = 0;

  void add(const Sums& other) {
    absolute += other.absolute;
    squares += other.squares;
    count += other.count;
  }
};

// Factors of the gradient of a difference d, which is d · per_norm + sign(d) · per_count.
template <typename T>
struct Slopes {
  T per_norm, per_count;
};

}  // namespace smi_fast

#define SMI_KERNEL_HEADER "total_variation_kernel.h"
#define SMI_KERNEL_NAMESPACE total_variation
#include "isa_dispatch.h"

namespace smi_fast {
namespace {

// The tasks of one call. With `active`, a task is all active patches of one plane; a patch that
// repeats counts once. Otherwise it is one band of rows of one plane.
class Tasks {
 public:
  Tasks(const Tensor& images, const std::optional<Tensor>& active, int64_t patch_size)
      : channels_(images.size(1)) {
    const int64_t height = images.size(2), width = images.size(3);
    if (active) {
      grid_ = {height, width, patch_size, patch_size};
      const int64_t cells = grid_.rows * grid_.columns, count = active->size(1);
      const Tensor checked = checked_indices("active", *active, cells);
      const int64_t* values = checked.const_data_ptr<int64_t>();  // [B, K]
      is_active_.assign(active->size(0) * cells, 0);
      for (int64_t i = 0; i < checked.numel(); ++i) {
        if (i % count == 0) begins_.push_back(static_cast<int64_t>(cells_.size()));
        uint8_t& is_active = is_active_[i / count * cells + values[i]];
        if (!is_active) cells_.push_back(values[i]);
        is_active = 1;
      }
      begins_.resize(active->size(0) + 1, static_cast<int64_t>(cells_.size()));
      kept_per_image_ = cells;
      band_rows_ = height;
    } else {
      // A band and its gradient fit in the L1 cache.
      constexpr int64_t kBandPixels = 4096;
      band_rows_ = std::max<int64_t>(1, kBandPixels / std::max<int64_t>(1, width));
      grid_ = {height, width, band_rows_, std::max<int64_t>(1, width)};
      bands_ = grid_.rows;
      cells_.resize(bands_);
      std::iota(cells_.begin(), cells_.end(), 0);
      is_active_.assign(bands_, 1);
    }
    count_ = images.numel() ? images.size(0) * channels_ * bands_ : 0;
  }

  const Grid& grid() const { return grid_; }
  int64_t count() const { return count_; }
  int64_t pixels() const { return std::min(band_rows_, grid_.height) * grid_.width; }

  // Offset of the task's plane.
  int64_t plane(int64_t task) const { return task / bands_ * grid_.height * grid_.width; }

  Cells cells(int64_t task) const {
    if (begins_.empty()) return {cells_.data() + task % bands_, 1, is_active_.data()};
    const int64_t image = task / channels_;
    return {cells_.data() + begins_[image], begins_[image + 1] - begins_[image],
            is_active_.data() + image * kept_per_image_};
  }

  // The rows of the plane whose gradient the task writes.
  Rectangle band(int64_t task) const {
    const int64_t top = task % bands_ * band_rows_;
    return {top, 0, std::min(top + band_rows_, grid_.height), grid_.width};
  }

 private:
  Grid grid_{0, 0, 1, 1};
  int64_t channels_, count_, band_rows_, bands_ = 1;
  int64_t kept_per_image_ = 0;
  std::vector<int64_t> cells_;      // the active cells of each image, or [bands] for all images
  std::vector<int64_t> begins_;     // [B + 1], where those of each image begin; empty without
  std::vector<uint8_t> is_active_;  // [B, cells], or [bands] for all images
};

Tensor total_variation(const Tensor& images_any, const std::optional<Tensor>& active,
                       int64_t patch_size) {
  const Tensor images = as_contiguous(images_any);
  const Tasks tasks(images, active, patch_size);
  const Tensor sums = torch::stable::new_empty(images, {3, kKinds});
  with_type_of(images, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = SMI_BEST(sum_differences<T>);
    const T* pixels = images.const_data_ptr<T>();  // [B, C, H, W]
    std::vector<Sums> task_sums(tasks.count() * kKinds);
    for_each_task(tasks.count(), tasks.pixels(), [&](int64_t i) {
      kernel(pixels + tasks.plane(i), tasks.grid(), tasks.cells(i), &task_sums[i * kKinds]);
    });
    T* out = sums.mutable_data_ptr<T>();  // [3, 4]
    for (int kind = 0; kind < kKinds; ++kind) {
      Sums total;
      for (int64_t i = 0; i < tasks.count(); ++i) total.add(task_sums[i * kKinds + kind]);
      out[kind] = static_cast<T>(total.absolute);
      out[kKinds + kind] = static_cast<T>(std::sqrt(total.squares));
      out[2 * kKinds + kind] = static_cast<T>(total.count);
    }
  });
  return sums;
}

Tensor total_variation_backward(const Tensor& grad_l1, const Tensor& grad_l2,
                                const Tensor& images_any, const std::optional<Tensor>& active,
                                int64_t patch_size, const Tensor& sums_any) {
  const Tensor images = as_contiguous(images_any), sums = as_contiguous(sums_any);
  const Tasks tasks(images, active, patch_size);
  const Tensor result = new_result(images, sizes_of(images));
  with_type_of(images, [&](auto zero) {
    using T = decltype(zero);
    const T* pixels = images.const_data_ptr<T>();  // [B, C, H, W]
    const T* norms = sums.const_data_ptr<T>() + kKinds;
    const T* counts = norms + kKinds;
    Slopes<T> slopes[kKinds];
    for (int kind = 0; kind < kKinds; ++kind) {
      const T norm = norms[kind], count = counts[kind];
      slopes[kind] = {norm > 0 ? *grad_l2.const_data_ptr<T>() / norm : 0,
                      count > 0 ? *grad_l1.const_data_ptr<T>() / count : 0};
    }
    const bool signs = std::any_of(slopes, slopes + kKinds,
                                   [](const Slopes<T>& slope) { return slope.per_count != 0; });
    const auto kernel = signs ? SMI_BEST(add_gradient<true, T>) : SMI_BEST(add_gradient<false, T>);
    T* out = result.mutable_data_ptr<T>();  // [B, C, H, W]
    for_each_task(tasks.count(), tasks.pixels(), [&](int64_t i) {
      T* plane = out + tasks.plane(i);
      const Rectangle band = tasks.band(i);
      std::fill(plane + band.top * band.right, plane + band.bottom * band.right, T{0});
      std::vector<T> rows(SMI_BEST(rows_size<T>)(tasks.grid().cell_width));
      kernel(pixels + tasks.plane(i), tasks.grid(), tasks.cells(i), slopes, rows.data(), plane);
    });
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(smi_fast, CPU, m) {
  m.impl("total_variation", TORCH_BOX(&total_variation));
  m.impl("total_variation_backward", TORCH_BOX(&total_variation_backward));
}

}  // namespace smi_fast
