// Differences of neighbouring pixels, summed in two stages; specified by total_variation in
// reference.py.
#include "common.cuh"

namespace smi_fast {
namespace {

constexpr int kWarps = 8, kOffsets = 4;

// Offsets of the four neighbours: right, below, below right and below left.
__host__ __device__ constexpr int down(int k) { return k > 0; }
__host__ __device__ constexpr int right(int k) { return k == 1 ? 0 : k == 3 ? -1 : 1; }

// One image plane, and which of its patches are active.
template <typename T>
struct Plane {
  const T* pixels;      // [H, W]
  const uint8_t* mask;  // [H/P, W/P] or null
  int height, width, patch;

  __device__ Plane(const T* images, const uint8_t* mask, unsigned plane, const ImageShape& shape)
      : pixels(images + plane * shape.height * shape.width),
        mask(mask),
        height(static_cast<int>(shape.height)),
        width(static_cast<int>(shape.width)),
        patch(static_cast<int>(shape.patch)) {
    const int64_t patches = patch ? (height / patch) * (width / patch) : 0;
    this->mask += plane / static_cast<unsigned>(shape.channels) * patches;
  }

  __device__ float at(int y, int x) const {
    return to_float(pixels[static_cast<int64_t>(y) * width + x]);
  }

  __device__ bool active(int y, int x) const {
    return patch == 0 || mask[y / patch * (width / patch) + x / patch] != 0;
  }

  // Whether pixel (y, x) exists and a difference to it counts.
  __device__ bool counts(int y, int x, bool other_is_active) const {
    return y >= 0 && y < height && x >= 0 && x < width && (other_is_active || active(y, x));
  }
};

__global__ void _mark_patches(const int64_t* __restrict__ active,  // [B, K]
                              uint8_t* __restrict__ mask,          // [B, H/P * W/P], zero
                              int64_t count, int64_t active_per_image, int64_t patches) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count || active[i] < 0 || active[i] >= patches) return;
  // Only the first thread of a patch that repeats marks it: no two threads write to one place.
  for (int64_t j = i - i % active_per_image; j < i; ++j) {
    if (active[j] == active[i]) return;
  }
  mask[i / active_per_image * patches + active[i]] = 1;
}

// A warp walks along rows of pixels, of which there are fewer than 2^31.
template <typename T>
__global__ void __launch_bounds__(kWarp* kWarps)
    _total_variation_fwd(const T* __restrict__ images,      // [B, C, H, W]
                         const uint8_t* __restrict__ mask,  // [B, H/P * W/P] or null
                         double* __restrict__ partials,     // [blocks, 12]
                         ImageShape shape) {
  const auto height = static_cast<unsigned>(shape.height);
  const auto rows = static_cast<unsigned>(shape.images * shape.channels) * height;
  // A thread sums only its part of the rows, for which float suffices. Sums of threads and blocks
  // are added in double.
  float absolutes[kOffsets] = {}, squares[kOffsets] = {};
  int counts[kOffsets] = {};
  for (unsigned row = blockIdx.x * kWarps + threadIdx.y; row < rows; row += gridDim.x * kWarps) {
    const Plane<T> plane(images, mask, row / height, shape);
    const int y = static_cast<int>(row % height);
    for (int x = threadIdx.x; x < plane.width; x += kWarp) {
      const bool active = plane.active(y, x);
#pragma unroll
      for (int k = 0; k < kOffsets; ++k) {
        if (!plane.counts(y + down(k), x + right(k), active)) continue;
        const float difference = plane.at(y, x) - plane.at(y + down(k), x + right(k));
        absolutes[k] += fabsf(difference);
        squares[k] += difference * difference;
        ++counts[k];
      }
    }
  }
  double sums[kVariationSums];
#pragma unroll
  for (int k = 0; k < kOffsets; ++k) {
    sums[k] = absolutes[k];
    sums[kOffsets + k] = squares[k];
    sums[2 * kOffsets + k] = counts[k];
  }
  const int thread = static_cast<int>(threadIdx.y * kWarp + threadIdx.x);
  const double total = block_sum<kVariationSums, kWarps>(sums, thread);
  if (thread < kVariationSums) partials[int64_t{blockIdx.x} * kVariationSums + thread] = total;
}

// Warp i adds sum i of all blocks.
__global__ void __launch_bounds__(kWarp* kVariationSums)
    _total_variation_sum(const double* __restrict__ partials,  // [blocks, 12]
                         float* __restrict__ sums,             // [3, 4]
                         int blocks) {
  const int i = threadIdx.y;
  double total = 0.0;
  for (int block = threadIdx.x; block < blocks; block += kWarp) {
    total += partials[int64_t{block} * kVariationSums + i];
  }
  total = warp_sum(total);
  const bool norm = i / kOffsets == 1;
  if (threadIdx.x == 0) sums[i] = static_cast<float>(norm ? sqrt(total) : total);
}

// Each pixel gathers its gradient from its eight neighbours.
template <typename T>
__global__ void __launch_bounds__(kWarp* kWarps)
    _total_variation_bwd(const float* __restrict__ grad_l1,  // []
                         const float* __restrict__ grad_l2,  // []
                         const T* __restrict__ images,       // [B, C, H, W]
                         const uint8_t* __restrict__ mask,   // [B, H/P * W/P] or null
                         const float* __restrict__ sums,     // [3, 4]
                         T* __restrict__ grad_images,        // [B, C, H, W]
                         ImageShape shape) {
  // d l1 / dd = sign(d) / count and d l2 / dd = d / norm. They are zero if the divisor is zero.
  __shared__ float per_norm[kOffsets], per_count[kOffsets];
  if (const unsigned k = threadIdx.x; threadIdx.y == 0 && k < kOffsets) {
    const float norm = sums[kOffsets + k], count = sums[2 * kOffsets + k];
    per_norm[k] = norm > 0.0f ? *grad_l2 / norm : 0.0f;
    per_count[k] = count > 0.0f ? *grad_l1 / count : 0.0f;
  }
  __syncthreads();
  const auto slope = [&](float difference, int k) {
    const float sign = static_cast<float>((difference > 0.0f) - (difference < 0.0f));
    return difference * per_norm[k] + sign * per_count[k];
  };
  const auto height = static_cast<unsigned>(shape.height);
  const auto rows = static_cast<unsigned>(shape.images * shape.channels) * height;
  for (unsigned row = blockIdx.x * kWarps + threadIdx.y; row < rows; row += gridDim.x * kWarps) {
    const Plane<T> plane(images, mask, row / height, shape);
    const int y = static_cast<int>(row % height);
    for (int x = threadIdx.x; x < plane.width; x += kWarp) {
      const bool active = plane.active(y, x);
      const float here = plane.at(y, x);
      float gradient = 0.0f;
#pragma unroll
      for (int k = 0; k < kOffsets; ++k) {
        // The slope is an odd function, so a difference counts the same whichever pixel it starts
        // from.
        for (int side = -1; side <= 1; side += 2) {
          const int other_y = y + side * down(k), other_x = x + side * right(k);
          if (!plane.counts(other_y, other_x, active)) continue;
          gradient += slope(here - plane.at(other_y, other_x), k);
        }
      }
      grad_images[int64_t{row} * plane.width + x] = from_float<T>(gradient);
    }
  }
}

unsigned blocks_for(const ImageShape& shape) {
  const int64_t rows = shape.images * shape.channels * shape.height;
  const int64_t blocks = divide_up(rows, kWarps);
  return static_cast<unsigned>(blocks < kVariationBlocks ? blocks : kVariationBlocks);
}

cudaError_t mark_patches(const int64_t* active, uint8_t* mask, const ImageShape& shape,
                         cudaStream_t stream) {
  const int64_t patches = shape.height / shape.patch * (shape.width / shape.patch);
  const cudaError_t error = cudaMemsetAsync(mask, 0, shape.images * patches, stream);
  if (error != cudaSuccess) return error;
  const int64_t count = shape.images * shape.kept;
  return launch(_mark_patches, {static_cast<unsigned>(divide_up(count, 256))}, {256}, 0, stream,
                active, mask, count, shape.kept, patches);
}

}  // namespace

cudaError_t launch_total_variation_fwd(Type type, const void* images, const int64_t* active,
                                       uint8_t* mask, double* partials, float* sums,
                                       ImageShape shape, cudaStream_t stream) {
  if (active == nullptr) {
    mask = nullptr;
    shape.patch = 0;
  } else if (cudaError_t error = mark_patches(active, mask, shape, stream); error != cudaSuccess) {
    return error;
  }
  const unsigned blocks = blocks_for(shape);
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    const cudaError_t error = launch(_total_variation_fwd<T>, {blocks}, {kWarp, kWarps}, 0, stream,
                                     static_cast<const T*>(images), mask, partials, shape);
    if (error != cudaSuccess) return error;
    return launch(_total_variation_sum, {1}, {kWarp, kVariationSums}, 0, stream, partials, sums,
                  static_cast<int>(blocks));
  });
}

cudaError_t launch_total_variation_bwd(Type type, const float* grad_l1, const float* grad_l2,
                                       const void* images, const int64_t* active, uint8_t* mask,
                                       const float* sums, void* grad_images, ImageShape shape,
                                       cudaStream_t stream) {
  if (active == nullptr) {
    mask = nullptr;
    shape.patch = 0;
  } else if (cudaError_t error = mark_patches(active, mask, shape, stream); error != cudaSuccess) {
    return error;
  }
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    return launch(_total_variation_bwd<T>, {blocks_for(shape)}, {kWarp, kWarps}, 0, stream, grad_l1,
                  grad_l2, static_cast<const T*>(images), mask, sums, static_cast<T*>(grad_images),
                  shape);
  });
}

}  // namespace smi_fast
