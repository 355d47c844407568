// Helpers of all CPU ops: contiguous, checked tensors and parallel tasks.

#pragma once

// Torch's own headers cause this warning.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#pragma GCC diagnostic pop

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

namespace smi_fast {

using torch::headeronly::BFloat16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The fewest elements that are worth a thread.
constexpr int64_t kGrain = 16384;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Calls `run` with a zero of the tensor's element type.
template <typename Run>
auto with_type_of(const Tensor& tensor, const Run& run) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "expected float32 or float64, got ", torch::headeronly::toString(type));
  return type == ScalarType::Float ? run(float{}) : run(double{});
}

// The type that elements are computed in: bfloat16 only stores them.
template <typename S>
using Computed = std::conditional_t<std::is_same_v<S, BFloat16>, float, S>;

inline ScalarType computed_type(ScalarType stored) {
  return stored == ScalarType::BFloat16 ? ScalarType::Float : stored;
}

// Calls `run` with a zero of the tensor's element type, which may be bfloat16 too.
template <typename Run>
auto with_stored_type_of(const Tensor& tensor, const Run& run) {
  if (tensor.scalar_type() == ScalarType::BFloat16) return run(BFloat16{});
  return with_type_of(tensor, run);
}

// Prefetches the cache lines of `count` consecutive elements.
template <typename T>
inline void prefetch(const T* run, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(run + i);
  __builtin_prefetch(run + count - 1);
}

// Calls run(i) for each i < count. Tasks of `size` elements run in parallel if they are large
// enough.
template <typename Run>
void for_each_task(int64_t count, int64_t size, const Run& run) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, size));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(i);
  });
}

// Returns the indices [B, K] as a contiguous tensor. Throws if one of them isn't in [0, total);
// `name` is the op's argument.
inline Tensor checked_indices(const char* name, const Tensor& indices, int64_t total) {
  const Tensor result = as_contiguous(indices);
  const int64_t* values = result.const_data_ptr<int64_t>();  // [B, K]
  for (int64_t i = 0; i < result.numel(); ++i) {
    STD_TORCH_CHECK(values[i] >= 0 && values[i] < total, "expected ", name, " in [0, ", total,
                    "), got ", values[i], " at [", i / indices.size(1), ", ", i % indices.size(1),
                    "]");
  }
  return result;
}

}  // namespace smi_fast
