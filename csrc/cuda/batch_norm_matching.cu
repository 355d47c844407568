// BatchNorm in eval mode and the statistics of its input; specified by batch_norm_matching in
// reference.py.
#include "common.cuh"

namespace smi_fast {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kElementsPerBlock = 8192;

// Calls visit(i) for each of this block's elements of channel blockIdx.y, with its offset i in x.
template <typename F>
__device__ void for_each_element(const NormShape& shape, F visit) {
  const auto pixels = static_cast<uint32_t>(shape.pixels);
  const auto count = static_cast<uint32_t>(shape.images * shape.pixels);
  // count < 2^31 and the stride is at most 2^14, so i doesn't wrap around.
  for (uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < count; i += gridDim.x * kThreads) {
    visit((i / pixels * shape.channels + blockIdx.y) * shape.pixels + i % pixels);
  }
}

// Reads x once. Sums of x - running_mean keep their digits if the mean is far from zero.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    _batch_norm_matching_fwd(const T* __restrict__ x,             // [B, C, H*W]
                             const T* __restrict__ running_mean,  // [C]
                             const T* __restrict__ running_var,   // [C]
                             const T* __restrict__ weight,        // [C]
                             const T* __restrict__ bias,          // [C]
                             float eps,
                             double* __restrict__ partials,  // [C, splits, 2]
                             T* __restrict__ y,              // [B, C, H*W]
                             NormShape shape) {
  const int64_t channel = blockIdx.y;
  const float center = to_float(running_mean[channel]), shift = to_float(bias[channel]);
  const float scale = to_float(weight[channel]) * rsqrtf(to_float(running_var[channel]) + eps);
  double sums[2] = {};
  for_each_element(shape, [&](int64_t i) {
    const float value = to_float(x[i]);
    y[i] = from_float<T>((value - center) * scale + shift);
    const double centered = double{value} - double{center};
    sums[0] += centered;
    sums[1] += centered * centered;
  });
  const int thread = static_cast<int>(threadIdx.x);
  const double total = block_sum<2, kThreads / kWarp>(sums, thread);
  if (thread < 2) partials[(channel * gridDim.x + blockIdx.x) * 2 + thread] = total;
}

// Adds the partial sums of each channel in order, one thread per channel.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    _batch_norm_statistics(const double* __restrict__ partials,  // [C, splits, 2]
                           const T* __restrict__ running_mean,   // [C]
                           float* __restrict__ mean,             // [C]
                           float* __restrict__ var,              // [C]
                           int splits, NormShape shape) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (channel >= shape.channels) return;
  double sum = 0.0, squares = 0.0;
  for (int64_t split = channel * splits; split < (channel + 1) * splits; ++split) {
    sum += partials[2 * split];
    squares += partials[2 * split + 1];
  }
  const auto count = static_cast<double>(shape.images * shape.pixels);
  const double centered = sum / count;
  mean[channel] = static_cast<float>(centered + to_float(running_mean[channel]));
  var[channel] = static_cast<float>(squares / count - centered * centered);
}

// dx = dy * w / sqrt(running_var + eps) + offset + slope * x, where offset and slope come from the
// gradient of the statistics.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    _batch_norm_matching_bwd(const T* __restrict__ grad,         // [B, C, H*W]
                             const T* __restrict__ x,            // [B, C, H*W]
                             const T* __restrict__ running_var,  // [C]
                             const T* __restrict__ weight,       // [C]
                             float eps,
                             const float* __restrict__ offset,  // [C]
                             const float* __restrict__ slope,   // [C]
                             T* __restrict__ grad_x,            // [B, C, H*W]
                             NormShape shape) {
  const int64_t channel = blockIdx.y;
  const float scale = to_float(weight[channel]) * rsqrtf(to_float(running_var[channel]) + eps);
  const float constant = offset[channel], per_x = slope[channel];
  for_each_element(shape, [&](int64_t i) {
    grad_x[i] = from_float<T>(to_float(grad[i]) * scale + constant + per_x * to_float(x[i]));
  });
}

// The number of blocks per channel depends on the shape only, and so does the order of the sums.
dim3 grid_for(const NormShape& shape) {
  int64_t splits = divide_up(shape.images * shape.pixels, kElementsPerBlock);
  if (splits > kNormSplits) splits = kNormSplits;
  dim3 grid;
  grid.x = static_cast<unsigned>(splits);
  grid.y = static_cast<unsigned>(shape.channels);
  return grid;
}

}  // namespace

cudaError_t launch_batch_norm_matching_fwd(Type type, const void* x, const void* running_mean,
                                           const void* running_var, const void* weight,
                                           const void* bias, double eps, double* partials, void* y,
                                           float* mean, float* var, NormShape shape,
                                           cudaStream_t stream) {
  const dim3 grid = grid_for(shape);
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    const auto typed = [](const void* pointer) { return static_cast<const T*>(pointer); };
    const cudaError_t error =
        launch(_batch_norm_matching_fwd<T>, grid, {kThreads}, 0, stream, typed(x),
               typed(running_mean), typed(running_var), typed(weight), typed(bias),
               static_cast<float>(eps), partials, static_cast<T*>(y), shape);
    if (error != cudaSuccess) return error;
    return launch(_batch_norm_statistics<T>,
                  {static_cast<unsigned>(divide_up(shape.channels, kThreads))}, {kThreads}, 0,
                  stream, partials, typed(running_mean), mean, var, static_cast<int>(grid.x),
                  shape);
  });
}

cudaError_t launch_batch_norm_matching_bwd(Type type, const void* grad, const void* x,
                                           const void* running_var, const void* weight, double eps,
                                           const float* offset, const float* slope, void* grad_x,
                                           NormShape shape, cudaStream_t stream) {
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    const auto typed = [](const void* pointer) { return static_cast<const T*>(pointer); };
    return launch(_batch_norm_matching_bwd<T>, grid_for(shape), {kThreads}, 0, stream, typed(grad),
                  typed(x), typed(running_var), typed(weight), static_cast<float>(eps), offset,
                  slope, static_cast<T*>(grad_x), shape);
  });
}

}  // namespace smi_fast
