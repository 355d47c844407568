// Windows of images that kept patches show under jitter.

#pragma once

#include <cstring>

#include "common.h"

namespace smi_fast {

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

inline int64_t modulo(int64_t a, int64_t b) { return (a % b + b) % b; }

// A shift in pixels, as whole patches: rounded to the nearest, half upwards.
inline int64_t nearest_cells(int64_t shift, int64_t size) {
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

  // Copies the window of a patch out of an image [C, H, W] into `out` [C, P, P]. Rows of a window
  // lie too far apart for the hardware prefetcher, so those of the window `next` in `next_image`
  // are prefetched here.
  template <typename T>
  void gather(const T* image, int64_t channels, int64_t patch, const T* next_image, int64_t next,
              T* out) const {
    const Window &here = windows_[patch], &there = windows_[next];
    const int64_t ahead = std::min(size_, width_ - there.left), plane = height_ * width_;
    for (int64_t channel = 0; channel < channels; ++channel) {
      for (int64_t y = 0; y < size_; ++y, out += size_) {
        const int64_t next_row = below(there.top, y);
        prefetch(next_image + channel * plane + next_row * width_ + there.left, ahead);
        const T* row = image + channel * plane + below(here.top, y) * width_;
        for_each_run(patch,
                     [&](const Run& run) { here.copy(row + run.x, run.count, out + run.offset); });
      }
    }
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

  // Writes one row of an image from patches: `values` is the row's place in the first patch of the
  // batch, and patches lie `length` elements apart. Pixels between the runs become zero.
  template <typename T>
  void scatter_row(const std::vector<Run>& runs, const T* values, int64_t length, T* row) const {
    int64_t written = 0;
    for (const Run& run : runs) {
      std::fill(row + written, row + std::max(written, run.x), T{0});
      windows_[run.patch].copy(values + run.patch * length + run.offset, run.count, row + run.x);
      written = run.x + run.count;
    }
    std::fill(row + written, row + width_, T{0});
  }

 private:
  static int64_t wrapped(int64_t a, int64_t size) { return a < size ? a : a - size; }

  int64_t height_, width_, size_, count_;
  std::vector<int64_t> tops_;    // [B], the row where each image's shifted grid starts
  std::vector<Window> windows_;  // [B, K]
};

}  // namespace smi_fast
