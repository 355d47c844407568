#include <cstring>

#include "recycled_memory.h"

namespace smi_fast {
namespace {

// Elements that are copied at a time.
constexpr int64_t kCopyBlock = 8;

template <typename T>
inline void copy_run(const T* __restrict from, int64_t count, T* __restrict to) {
  int64_t i = 0;
  for (; i + kCopyBlock <= count; i += kCopyBlock)
    std::memcpy(to + i, from + i, kCopyBlock * sizeof(T));
  for (; i < count; ++i) to[i] = from[i];
}

template <typename T>
inline void copy_mirrored(const T* __restrict from, int64_t count, T* __restrict to) {
  int64_t i = 0;
  for (; i + kCopyBlock <= count; i += kCopyBlock) {
    for (int64_t j = 0; j < kCopyBlock; ++j) to[i + j] = from[count - 1 - i - j];
  }
  for (; i < count; ++i) to[i] = from[count - 1 - i];
}

int64_t modulo(int64_t a, int64_t b) { return (a % b + b) % b; }

// A shift in pixels, as whole patches: rounded to the nearest, half upwards.
int64_t nearest_cells(int64_t shift, int64_t size) {
  return (2 * shift + size - modulo(2 * shift + size, 2 * size)) / (2 * size);
}

// The window of an image that a kept patch shows under jitter: its corner, the cell it lands on,
// and whether its rows are mirrored.
struct Window {
  int64_t top, left, cell;
  bool flip;

  template <typename T>
  void copy(const T* from, int64_t count, T* to) const {
    if (flip) {
      copy_mirrored(from, count, to);
    } else {
      copy_run(from, count, to);
    }
  }
};

// A stretch of a patch's rows that is contiguous in rows of the image: `count` pixels from column x
// of the image on, which go to column `offset` of the patch on.
struct Run {
  int64_t x, patch, offset, count;
};

// The windows of all kept patches. Those of one image lie on one shifted grid, which wraps around.
class Windows {
 public:
  Windows(const Tensor& kept_any, const Tensor& shift, const Tensor& flip, int64_t height,
          int64_t width, int64_t size)
      : height_(height), width_(width), size_(size), count_(kept_any.size(1)) {
    const int64_t columns = width / size;
    const Tensor kept = checked_indices("kept", kept_any, rows() * columns);
    tops_.resize(kept.size(0));
    if (kept.numel() == 0) return;
    const int64_t* patches = kept.const_data_ptr<int64_t>();  // [B, K]
    const int64_t* pixels = shift.const_data_ptr<int64_t>();  // [B, 2], any strides
    const bool* flips = flip.const_data_ptr<bool>();          // [B], any stride
    windows_.resize(kept.numel());
    for (int64_t image = 0; image < kept.size(0); ++image) {
      const int64_t down = pixels[image * shift.stride(0)];
      const int64_t right = pixels[image * shift.stride(0) + shift.stride(1)];
      const bool mirrored = flips[image * flip.stride(0)];
      const int64_t left = modulo(-right, width);
      const int64_t cells_down = modulo(nearest_cells(down, size), rows());
      const int64_t cells_right = modulo(nearest_cells(right, size), columns);
      tops_[image] = modulo(-down, height);
      for (int64_t i = image * count_; i < (image + 1) * count_; ++i) {
        const int64_t row = wrapped(patches[i] / columns + cells_down, rows());
        const int64_t column = wrapped(patches[i] % columns + cells_right, columns);
        windows_[i] = {top(image, row), wrapped(left + column * size, width),
                       row * columns + (mirrored ? columns - 1 - column : column), mirrored};
      }
    }
  }

  int64_t rows() const { return height_ / size_; }
  const Window& operator[](int64_t patch) const { return windows_[patch]; }

  // The row of the image where this row of its shifted grid starts.
  int64_t top(int64_t image, int64_t grid_row) const {
    return wrapped(tops_[image] + grid_row * size_, height_);
  }

  // The row of the image that is y rows below `row`, with wraparound.
  int64_t below(int64_t row, int64_t y) const { return wrapped(row + y, height_); }

  // Calls visit with each run of a window, of which there are two if it wraps around the image. A
  // flip mirrors its rows.
  template <typename Visit>
  void for_each_run(int64_t patch, const Visit& visit) const {
    const int64_t left = windows_[patch].left, first = std::min(size_, width_ - left);
    const bool flip = windows_[patch].flip;
    visit(Run{left, patch, flip ? size_ - first : 0, first});
    if (first < size_) visit(Run{0, patch, flip ? 0 : first, size_ - first});
  }

  // The runs of an image that lie in one row of its shifted grid, from left to right.
  std::vector<Run> runs(int64_t image, int64_t grid_row) const {
    std::vector<Run> found;
    for (int64_t i = image * count_; i < (image + 1) * count_; ++i) {
      if (windows_[i].top != top(image, grid_row)) continue;
      for_each_run(i, [&](const Run& run) { found.push_back(run); });
    }
    std::sort(found.begin(), found.end(), [](const Run& a, const Run& b) { return a.x < b.x; });
    return found;
  }

 private:
  static int64_t wrapped(int64_t a, int64_t size) { return a < size ? a : a - size; }

  int64_t height_, width_, size_, count_;
  std::vector<int64_t> tops_;    // [B], the row where each image's shifted grid starts
  std::vector<Window> windows_;  // [B, K]
};

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
    for_each_task(batch * count, length, [&](int64_t i) {
      position_data[i] = windows[i].cell;
      // Rows of a window lie too far apart for the hardware prefetcher, so the next window's are
      // prefetched here.
      const int64_t next = std::min(i + 1, batch * count - 1);
      const int64_t ahead = std::min(patch_size, width - windows[next].left);
      T* out = patch_data + i * length;
      for (int64_t channel = 0; channel < channels; ++channel) {
        const T* plane = image_data + (i / count * channels + channel) * height * width;
        const T* next_plane = image_data + (next / count * channels + channel) * height * width;
        for (int64_t y = 0; y < patch_size; ++y, out += patch_size) {
          const int64_t next_row = windows.below(windows[next].top, y);
          prefetch(next_plane + next_row * width + windows[next].left, ahead);
          const T* row = plane + windows.below(windows[i].top, y) * width;
          windows.for_each_run(i, [&](const Run& run) {
            windows[i].copy(row + run.x, run.count, out + run.offset);
          });
        }
      }
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
          int64_t written = 0;
          for (const Run& run : runs) {
            std::fill(row + written, row + std::max(written, run.x), T{0});
            windows[run.patch].copy(values + run.patch * length + run.offset, run.count,
                                    row + run.x);
            written = run.x + run.count;
          }
          std::fill(row + written, row + width, T{0});
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
