#include "common.h"

namespace smi_fast {
namespace {

// A kept patch in an image: the corner of the window that it shows under jitter, and its new cell.
struct Window {
  int64_t top, left, cell;
};

int64_t modulo(int64_t a, int64_t b) { return (a % b + b) % b; }

// A shift in whole patches, rounded to the nearest, half upwards.
int64_t nearest_cells(int64_t shift, int64_t size) {
  return (2 * shift + size - modulo(2 * shift + size, 2 * size)) / (2 * size);
}

struct Jitter {
  int64_t height, width, size, down, right;
  bool flip;

  Jitter(const Tensor& shift, const Tensor& flip, int64_t height, int64_t width, int64_t size)
      : height(height), width(width), size(size), flip(*flip.const_data_ptr<bool>()) {
    const int64_t* pixels = shift.const_data_ptr<int64_t>();  // [2]
    down = pixels[0];
    right = pixels[shift.stride(0)];
  }

  int64_t cells() const { return (height / size) * (width / size); }

  Window window(int64_t patch) const {
    const int64_t rows = height / size, columns = width / size;
    const int64_t row = modulo(patch / columns + nearest_cells(down, size), rows);
    const int64_t column = modulo(patch % columns + nearest_cells(right, size), columns);
    return {modulo(row * size - down, height), modulo(column * size - right, width),
            row * columns + (flip ? columns - 1 - column : column)};
  }

  // A window's row wraps around the image and is mirrored by a flip, so it is one or two runs.
  template <typename T>
  void gather_row(const T* image_row, int64_t left, T* out) const {
    const int64_t first = std::min(size, width - left);
    if (flip) {
      std::reverse_copy(image_row, image_row + size - first, out);
      std::reverse_copy(image_row + left, image_row + left + first, out + size - first);
    } else {
      std::copy_n(image_row + left, first, out);
      std::copy_n(image_row, size - first, out + first);
    }
  }

  template <typename T>
  void scatter_row(const T* values, int64_t left, T* image_row) const {
    const int64_t first = std::min(size, width - left);
    if (flip) {
      std::reverse_copy(values, values + size - first, image_row);
      std::reverse_copy(values + size - first, values + size, image_row + left);
    } else {
      std::copy_n(values, first, image_row + left);
      std::copy_n(values + first, size - first, image_row);
    }
  }
};

std::tuple<Tensor, Tensor> gather_patches(const Tensor& images_any, const Tensor& kept_any,
                                          const Tensor& shift, const Tensor& flip,
                                          int64_t patch_size) {
  const Tensor images = as_contiguous(images_any);
  const int64_t channels = images.size(1), height = images.size(2), width = images.size(3);
  const Jitter jitter(shift, flip, height, width, patch_size);
  const Tensor kept = checked_kept(kept_any, jitter.cells());
  const int64_t batch = kept.size(0), count = kept.size(1);
  const int64_t length = channels * patch_size * patch_size;
  const Tensor patches = torch::stable::new_empty(images, {batch, count, length});
  const Tensor positions = torch::stable::new_empty(kept, {batch, count});
  const int64_t* kept_data = kept.const_data_ptr<int64_t>();       // [B, K]
  int64_t* position_data = positions.mutable_data_ptr<int64_t>();  // [B, K]
  with_type_of(images, [&](auto zero) {
    using T = decltype(zero);
    const T* image_data = images.const_data_ptr<T>();  // [B, C, H, W]
    T* patch_data = patches.mutable_data_ptr<T>();     // [B, K, C, P, P]
    for_each_task(batch * count, length, [&](int64_t i) {
      const Window window = jitter.window(kept_data[i]);
      position_data[i] = window.cell;
      T* out = patch_data + i * length;
      for (int64_t channel = 0; channel < channels; ++channel) {
        const T* plane = image_data + (i / count * channels + channel) * height * width;
        for (int64_t y = 0; y < patch_size; ++y, out += patch_size) {
          jitter.gather_row(plane + (window.top + y) % height * width, window.left, out);
        }
      }
    });
  });
  return {patches, positions};
}

Tensor gather_patches_backward(const Tensor& grad_any, const Tensor& kept_any, const Tensor& shift,
                               const Tensor& flip, int64_t patch_size, int64_t height,
                               int64_t width) {
  const Tensor grad = as_contiguous(grad_any);
  const Jitter jitter(shift, flip, height, width, patch_size);
  const Tensor kept = checked_kept(kept_any, jitter.cells());
  const int64_t batch = kept.size(0), count = kept.size(1), area = patch_size * patch_size;
  const int64_t channels = grad.size(2) / area;
  const Tensor images = torch::stable::new_empty(grad, {batch, channels, height, width});
  const int64_t* kept_data = kept.const_data_ptr<int64_t>();  // [B, K]
  with_type_of(grad, [&](auto zero) {
    using T = decltype(zero);
    const T* grad_data = grad.const_data_ptr<T>();  // [B, K, C, P, P]
    T* image_data = images.mutable_data_ptr<T>();   // [B, C, H, W]
    // A task clears and fills one plane while that is in cache.
    for_each_task(batch * channels, height * width, [&](int64_t i) {
      T* plane = image_data + i * height * width;
      std::fill_n(plane, height * width, T{0});
      for (int64_t k = i / channels * count; k < (i / channels + 1) * count; ++k) {
        const Window window = jitter.window(kept_data[k]);
        const T* values = grad_data + (k * channels + i % channels) * area;
        for (int64_t y = 0; y < patch_size; ++y, values += patch_size) {
          jitter.scatter_row(values, window.left, plane + (window.top + y) % height * width);
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
