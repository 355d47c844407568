// Kept patches of jittered images, which are the sigmoid of a field; specified by
// gather_sigmoid_patches in reference.py.
#include <cmath>

#include "patch_window.cuh"

namespace smi_fast {
namespace {

// The place of an element of a window.
struct Place {
  int channel;
  int64_t pixel;  // in an image [C, H, W]
  bool frozen;

  __device__ Place(int element, const Window& window, const bool* frozen_patches,
                   const ImageShape& shape)
      : channel(element / static_cast<int>(shape.patch * shape.patch)),
        pixel(window.pixel(element, shape)),
        frozen(false) {
    if (!frozen_patches) return;
    const int width = static_cast<int>(shape.width), side = static_cast<int>(shape.patch);
    const int in_plane = static_cast<int>(pixel - channel * shape.height * shape.width);
    frozen = frozen_patches[in_plane / width / side * (width / side) + in_plane % width / side];
  }
};

__device__ int64_t patches_of(const ImageShape& shape) {
  return shape.height / shape.patch * (shape.width / shape.patch);
}

template <typename T>
__global__ void __launch_bounds__(kPatchThreads)
    _gather_sigmoid_patches_fwd(const T* __restrict__ field,                // [B, C, H, W]
                                const int64_t* __restrict__ kept,           // [B, K]
                                Jitter jitter, const T* __restrict__ mean,  // [C]
                                const T* __restrict__ std,                  // [C]
                                const T* __restrict__ background,           // [B, C, H, W] or null
                                const bool* __restrict__ frozen,            // [B, H/P, W/P] or null
                                T* __restrict__ patches,                    // [B, K, C*P*P]
                                int64_t* __restrict__ positions,            // [B, K]
                                ImageShape shape) {
  const int64_t token = blockIdx.x, image_size = shape.channels * shape.height * shape.width;
  const int elements = static_cast<int>(shape.channels * shape.patch * shape.patch);
  const int64_t image = blockIdx.x / static_cast<unsigned>(shape.kept);
  const Window window(kept[token], jitter, image, shape);
  if (frozen) frozen += image * patches_of(shape);
  for (int i = threadIdx.x; i < elements; i += kPatchThreads) {
    float value = NAN;
    if (window.position >= 0) {
      const Place place(i, window, frozen, shape);
      const int64_t pixel = image * image_size + place.pixel;
      if (place.frozen) {
        value = to_float(background[pixel]);
      } else {
        const float sigmoid = 1.0f / (1.0f + expf(-to_float(field[pixel])));
        value = (sigmoid - to_float(mean[place.channel])) / to_float(std[place.channel]);
      }
    }
    patches[token * elements + i] = from_float<T>(value);
  }
  if (threadIdx.x == 0) positions[token] = window.position;
}

// Windows of one image never overlap, so each pixel has at most one writer.
template <typename T>
__global__ void __launch_bounds__(kPatchThreads)
    _gather_sigmoid_patches_bwd(const T* __restrict__ grad,                // [B, K, C*P*P]
                                const T* __restrict__ field,               // [B, C, H, W]
                                const int64_t* __restrict__ kept,          // [B, K]
                                Jitter jitter, const T* __restrict__ std,  // [C]
                                const bool* __restrict__ frozen,           // [B, H/P, W/P] or null
                                T* __restrict__ grad_field,                // [B, C, H, W], zero
                                ImageShape shape) {
  const int64_t token = blockIdx.x, image_size = shape.channels * shape.height * shape.width;
  const int elements = static_cast<int>(shape.channels * shape.patch * shape.patch);
  const int64_t image = blockIdx.x / static_cast<unsigned>(shape.kept);
  const Window window(kept[token], jitter, image, shape);
  if (window.position < 0) return;
  if (frozen) frozen += image * patches_of(shape);
  for (int i = threadIdx.x; i < elements; i += kPatchThreads) {
    const Place place(i, window, frozen, shape);
    if (place.frozen) continue;
    const int64_t pixel = image * image_size + place.pixel;
    // sigmoid'(x) = e / (1 + e)² with e = e^-|x|, which never overflows.
    const float e = expf(-fabsf(to_float(field[pixel])));
    const float slope = e / ((1.0f + e) * (1.0f + e) * to_float(std[place.channel]));
    grad_field[pixel] = from_float<T>(to_float(grad[token * elements + i]) * slope);
  }
}

}  // namespace

cudaError_t launch_gather_sigmoid_patches_fwd(Type type, const void* field, const int64_t* kept,
                                              Jitter jitter, const void* mean, const void* std,
                                              const void* background, const bool* frozen,
                                              void* patches, int64_t* positions, ImageShape shape,
                                              cudaStream_t stream) {
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    return launch(_gather_sigmoid_patches_fwd<T>, one_block_per_patch(shape), {kPatchThreads}, 0,
                  stream, static_cast<const T*>(field), kept, jitter, static_cast<const T*>(mean),
                  static_cast<const T*>(std), static_cast<const T*>(background), frozen,
                  static_cast<T*>(patches), positions, shape);
  });
}

cudaError_t launch_gather_sigmoid_patches_bwd(Type type, const void* grad, const void* field,
                                              const int64_t* kept, Jitter jitter, const void* std,
                                              const bool* frozen, void* grad_field,
                                              ImageShape shape, cudaStream_t stream) {
  const int64_t elements = shape.images * shape.channels * shape.height * shape.width;
  const cudaError_t error = cudaMemsetAsync(grad_field, 0, elements * bytes_of(type), stream);
  if (error != cudaSuccess) return error;
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    return launch(_gather_sigmoid_patches_bwd<T>, one_block_per_patch(shape), {kPatchThreads}, 0,
                  stream, static_cast<const T*>(grad), static_cast<const T*>(field), kept, jitter,
                  static_cast<const T*>(std), frozen, static_cast<T*>(grad_field), shape);
  });
}

}  // namespace smi_fast
