// Kept patches of jittered images, read as displaced windows; specified by gather_patches in
// reference.py.
#include "common.cuh"

namespace smi_fast {
namespace {

constexpr int kThreads = 256;

// The shift within one image. A shift by whole images changes nothing, and the rest fits in 32
// bits.
__device__ int wrap(int64_t shift, int64_t size) {
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

// One block copies one patch.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    _gather_patches_fwd(const T* __restrict__ images,      // [B, C, H, W]
                        const int64_t* __restrict__ kept,  // [B, K]
                        Jitter jitter,
                        T* __restrict__ patches,          // [B, K, C*P*P]
                        int64_t* __restrict__ positions,  // [B, K]
                        ImageShape shape) {
  const int64_t token = blockIdx.x, plane = shape.height * shape.width;
  const int elements = static_cast<int>(shape.channels * shape.patch * shape.patch);
  const int64_t image_index = blockIdx.x / static_cast<unsigned>(shape.kept);
  const Window window(kept[token], jitter, image_index, shape);
  const T* image = images + image_index * shape.channels * plane;
  for (int i = threadIdx.x; i < elements; i += kThreads) {
    // All bits set is a NaN in every floating point type.
    patches[token * elements + i] =
        window.position < 0 ? static_cast<T>(~T{0}) : image[window.pixel(i, shape)];
  }
  if (threadIdx.x == 0) positions[token] = window.position;
}

// Windows of one image never overlap, so each pixel has at most one writer.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    _gather_patches_bwd(const T* __restrict__ grad,        // [B, K, C*P*P]
                        const int64_t* __restrict__ kept,  // [B, K]
                        Jitter jitter,
                        T* __restrict__ grad_images,  // [B, C, H, W], zero
                        ImageShape shape) {
  const int64_t token = blockIdx.x, plane = shape.height * shape.width;
  const int elements = static_cast<int>(shape.channels * shape.patch * shape.patch);
  const int64_t image_index = blockIdx.x / static_cast<unsigned>(shape.kept);
  const Window window(kept[token], jitter, image_index, shape);
  if (window.position < 0) return;
  T* image = grad_images + image_index * shape.channels * plane;
  for (int i = threadIdx.x; i < elements; i += kThreads) {
    image[window.pixel(i, shape)] = grad[token * elements + i];
  }
}

// Calls launcher(T{}) for the unsigned integer T of this size.
template <typename F>
cudaError_t with_size(int64_t bytes, F launcher) {
  switch (bytes) {
    case 2:
      return launcher(uint16_t{});
    case 4:
      return launcher(uint32_t{});
    case 8:
      return launcher(uint64_t{});
    default:
      return cudaErrorInvalidValue;
  }
}

dim3 one_block_per_patch(const ImageShape& shape) {
  dim3 grid;
  grid.x = static_cast<unsigned>(shape.images * shape.kept);
  return grid;
}

}  // namespace

cudaError_t launch_gather_patches_fwd(int64_t element_bytes, const void* images,
                                      const int64_t* kept, Jitter jitter, void* patches,
                                      int64_t* positions, ImageShape shape, cudaStream_t stream) {
  return with_size(element_bytes, [&](auto element) {
    using T = decltype(element);
    return launch(_gather_patches_fwd<T>, one_block_per_patch(shape), {kThreads}, 0, stream,
                  static_cast<const T*>(images), kept, jitter, static_cast<T*>(patches), positions,
                  shape);
  });
}

cudaError_t launch_gather_patches_bwd(int64_t element_bytes, const void* grad, const int64_t* kept,
                                      Jitter jitter, void* grad_images, ImageShape shape,
                                      cudaStream_t stream) {
  const int64_t elements = shape.images * shape.channels * shape.height * shape.width;
  const cudaError_t error = cudaMemsetAsync(grad_images, 0, elements * element_bytes, stream);
  if (error != cudaSuccess) return error;
  return with_size(element_bytes, [&](auto element) {
    using T = decltype(element);
    return launch(_gather_patches_bwd<T>, one_block_per_patch(shape), {kThreads}, 0, stream,
                  static_cast<const T*>(grad), kept, jitter, static_cast<T*>(grad_images), shape);
  });
}

}  // namespace smi_fast
