// The window of an image that a kept patch shows under jitter.
#pragma once

#include "common.cuh"

namespace smi_fast {

// Threads of a block, which does one patch.
constexpr int kPatchThreads = 256;

// The shift within one image. A shift by whole images changes nothing, and the rest fits in 32
// bits.
__device__ inline int wrap(int64_t shift, int64_t size) {
  const int64_t rest = shift % size;
  return static_cast<int>(rest < 0 ? rest + size : rest);
}

// The window of an image that a kept patch shows, and the cell that it lands on.
struct Window {
  int position;  // of the cell; -1 for a patch outside the grid
  int top, left;
  bool mirrored;

  __device__ Window(int64_t patch, const Jitter& jitter, int64_t image, const ImageShape& shape)
      : position(-1), top(0), left(0), mirrored(jitter.flip[image * jitter.flip_image]) {
    const int side = static_cast<int>(shape.patch);
    const int height = static_cast<int>(shape.height), width = static_cast<int>(shape.width);
    const int rows = height / side, columns = width / side;
    if (patch < 0 || patch >= rows * columns) return;
    const int64_t* shift = jitter.shift + image * jitter.shift_image;
    const int down = wrap(shift[0], height), right = wrap(shift[jitter.shift_axis], width);
    // The shift counts as whole patches, rounded to the nearest, half upwards.
    const int row = (static_cast<int>(patch) / columns + (2 * down + side) / (2 * side)) % rows;
    const int column =
        (static_cast<int>(patch) % columns + (2 * right + side) / (2 * side)) % columns;
    top = (row * side - down + height) % height;
    left = (column * side - right + width) % width;
    position = row * columns + (mirrored ? columns - 1 - column : column);
  }

  // Offset in an image [C, H, W] of element i of the patch [C, P, P].
  __device__ int64_t pixel(int i, const ImageShape& shape) const {
    const int side = static_cast<int>(shape.patch);
    const int height = static_cast<int>(shape.height), width = static_cast<int>(shape.width);
    const int across = i % side, plane_row = i / side;
    int y = top + plane_row % side;
    int x = left + (mirrored ? side - 1 - across : across);
    if (y >= height) y -= height;
    if (x >= width) x -= width;
    return (plane_row / side * shape.height + y) * width + x;
  }
};

inline dim3 one_block_per_patch(const ImageShape& shape) {
  dim3 grid;
  grid.x = static_cast<unsigned>(shape.images * shape.kept);
  return grid;
}

}  // namespace smi_fast
