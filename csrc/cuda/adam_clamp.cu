// One Adam step and a clamp, in place, in one pass; specified by adam_clamp_ in reference.py.
#include <cmath>

#include "common.cuh"

namespace smi_fast {
namespace {

constexpr int kThreads = 256;
constexpr float kEps = 1e-8f;

struct Rates {
  float first, second;  // 1 - beta1, 1 - beta2
  float decay;          // beta2
  float weight_decay;
  float log_first, log_second;  // log(beta1), log(beta2)
};

// Factors of step t.
struct Corrections {
  float step;    // lr / (1 - beta1^t)
  float second;  // sqrt(1 - beta2^t)
  float kept;    // 1 - lr * weight_decay
};

__device__ Corrections corrections_of(const Rates& rates,
                                      const int64_t* __restrict__ step,  // []
                                      const double* __restrict__ lr) {   // []
  const auto t = static_cast<float>(*step);
  const auto rate = static_cast<float>(*lr);
  return {rate / -expm1f(t * rates.log_first), sqrtf(-expm1f(t * rates.log_second)),
          1.0f - rate * rates.weight_decay};
}

template <typename T>
struct Pixels {
  T* images;                   // [B, C, H, W]
  const T* __restrict__ grad;  // [B, C, H, W]
  T* exp_avg;                  // [B, C, H, W]
  T* exp_avg_sq;               // [B, C, H, W]
  const T* __restrict__ low;   // [C]
  const T* __restrict__ high;  // [C]
};

// Updates the moments m and v, then the pixel:
// pixel = (1 - lr * weight_decay) * pixel
//         - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps).
template <typename T>
__device__ void step_pixel(const Pixels<T>& pixels, const Rates& rates,
                           const Corrections& corrections, int64_t i, int64_t channel) {
  const float slope = to_float(pixels.grad[i]);
  float mean = to_float(pixels.exp_avg[i]), square = to_float(pixels.exp_avg_sq[i]);
  mean += rates.first * (slope - mean);
  square = rates.decay * square + rates.second * slope * slope;
  float value = corrections.kept * to_float(pixels.images[i]);
  value -= corrections.step * mean / (sqrtf(square) / corrections.second + kEps);
  const float low = to_float(pixels.low[channel]), high = to_float(pixels.high[channel]);
  // Unlike fminf and fmaxf, comparisons pass a NaN on.
  value = value < low ? low : value > high ? high : value;
  pixels.images[i] = from_float<T>(value);
  pixels.exp_avg[i] = from_float<T>(mean);
  pixels.exp_avg_sq[i] = from_float<T>(square);
}

// blockIdx.x is the plane of one channel of one image.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    _adam_clamp_planes(Pixels<T> pixels, Rates rates,
                       const int64_t* __restrict__ step,  // []
                       const double* __restrict__ lr,     // []
                       ImageShape shape) {
  const Corrections corrections = corrections_of(rates, step, lr);
  const int64_t plane = blockIdx.x, size = shape.height * shape.width;
  for (int64_t i = blockIdx.y * int64_t{kThreads} + threadIdx.x; i < size;
       i += int64_t{gridDim.y} * kThreads) {
    step_pixel(pixels, rates, corrections, plane * size + i,
               blockIdx.x % static_cast<unsigned>(shape.channels));
  }
}

// blockIdx.x is an active patch.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    _adam_clamp_patches(Pixels<T> pixels, Rates rates,
                        const int64_t* __restrict__ step,    // []
                        const double* __restrict__ lr,       // []
                        const int64_t* __restrict__ active,  // [B, K]
                        ImageShape shape) {
  const Corrections corrections = corrections_of(rates, step, lr);
  const int side = static_cast<int>(shape.patch);
  const int64_t image = blockIdx.x / static_cast<unsigned>(shape.kept), patch = active[blockIdx.x];
  const int columns = static_cast<int>(shape.width) / side;
  const int rows = static_cast<int>(shape.height) / side;
  if (patch < 0 || patch >= rows * columns) return;
  const int top = static_cast<int>(patch) / columns * side;
  const int left = static_cast<int>(patch) % columns * side;
  for (int i = threadIdx.x; i < shape.channels * side * side; i += kThreads) {
    const int plane_row = i / side, channel = plane_row / side;
    const int64_t row = (image * shape.channels + channel) * shape.height + top + plane_row % side;
    step_pixel(pixels, rates, corrections, row * shape.width + left + i % side, channel);
  }
}

Rates rates_of(const AdamStep& adam) {
  return {static_cast<float>(1.0 - adam.beta1),     static_cast<float>(1.0 - adam.beta2),
          static_cast<float>(adam.beta2),           static_cast<float>(adam.weight_decay),
          static_cast<float>(std::log(adam.beta1)), static_cast<float>(std::log(adam.beta2))};
}

}  // namespace

cudaError_t launch_adam_clamp(Type type, void* images, const void* grad, void* exp_avg,
                              void* exp_avg_sq, AdamStep adam, const void* low, const void* high,
                              const int64_t* active, ImageShape shape, cudaStream_t stream) {
  const Rates rates = rates_of(adam);
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    const Pixels<T> pixels{static_cast<T*>(images),    static_cast<const T*>(grad),
                           static_cast<T*>(exp_avg),   static_cast<T*>(exp_avg_sq),
                           static_cast<const T*>(low), static_cast<const T*>(high)};
    dim3 grid;
    if (active != nullptr) {
      grid.x = static_cast<unsigned>(shape.images * shape.kept);
      return launch(_adam_clamp_patches<T>, grid, {kThreads}, 0, stream, pixels, rates, adam.step,
                    adam.lr, active, shape);
    }
    const int64_t chunks = divide_up(shape.height * shape.width, 4 * kThreads);
    grid.x = static_cast<unsigned>(shape.images * shape.channels);
    grid.y = static_cast<unsigned>(chunks < 1024 ? chunks : 1024);
    return launch(_adam_clamp_planes<T>, grid, {kThreads}, 0, stream, pixels, rates, adam.step,
                  adam.lr, shape);
  });
}

}  // namespace smi_fast
