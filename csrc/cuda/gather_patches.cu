// Kept patches of jittered images, read as displaced windows; specified by gather_patches in
// reference.py.
#include "patch_window.cuh"

namespace smi_fast {
namespace {

// One block copies one patch.
template <typename T>
__global__ void __launch_bounds__(kPatchThreads)
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
  for (int i = threadIdx.x; i < elements; i += kPatchThreads) {
    // All bits set is a NaN in every floating point type.
    patches[token * elements + i] =
        window.position < 0 ? static_cast<T>(~T{0}) : image[window.pixel(i, shape)];
  }
  if (threadIdx.x == 0) positions[token] = window.position;
}

// Windows of one image never overlap, so each pixel has at most one writer.
template <typename T>
__global__ void __launch_bounds__(kPatchThreads)
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
  for (int i = threadIdx.x; i < elements; i += kPatchThreads) {
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

}  // namespace

cudaError_t launch_gather_patches_fwd(int64_t element_bytes, const void* images,
                                      const int64_t* kept, Jitter jitter, void* patches,
                                      int64_t* positions, ImageShape shape, cudaStream_t stream) {
  return with_size(element_bytes, [&](auto element) {
    using T = decltype(element);
    return launch(_gather_patches_fwd<T>, one_block_per_patch(shape), {kPatchThreads}, 0, stream,
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
    return launch(_gather_patches_bwd<T>, one_block_per_patch(shape), {kPatchThreads}, 0, stream,
                  static_cast<const T*>(grad), kept, jitter, static_cast<T*>(grad_images), shape);
  });
}

}  // namespace smi_fast
