// The ops on tensors: they allocate results, check the limits of the kernels, and call the
// launchers.

// Torch's own headers cause this warning.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#pragma GCC diagnostic pop

#include <cstdint>
#include <optional>
#include <tuple>

#include "launchers.h"

namespace smi_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::new_empty;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;
using Optional = std::optional<Tensor>;

constexpr int64_t kCopyBytes = 16;
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Type::kFloat;
    case ScalarType::Half:
      return Type::kHalf;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "expected float32, float16 or bfloat16, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

// The tensor, contiguous and aligned for copies of 16 bytes.
Tensor ready(const Tensor& tensor) {
  const Tensor dense = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  const bool aligned = reinterpret_cast<uintptr_t>(dense.data_ptr()) % kCopyBytes == 0;
  return aligned ? dense : torch::stable::clone(dense);
}

Optional ready(const Optional& tensor) { return tensor ? Optional(ready(*tensor)) : std::nullopt; }

// Address of the indices, or null if they aren't given. An empty tensor has a null pointer too, so
// it gets another address.
const int64_t* indices(const Optional& tensor) {
  static constexpr int64_t kNone = 0;
  if (!tensor) return nullptr;
  return tensor->numel() > 0 ? tensor->const_data_ptr<int64_t>() : &kNone;
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_blocks(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= kMaxBlocks, "expected at most ", kMaxBlocks,
                  " blocks of work in one call, got ", blocks);
}

ImageShape image_shape(const Tensor& images, const Optional& kept, int64_t patch_size) {
  const ImageShape shape{images.size(0), images.size(1),           images.size(2),
                         images.size(3), kept ? kept->size(1) : 0, patch_size};
  check_blocks(shape.images * shape.kept);
  check_blocks(shape.images * shape.channels * shape.height);
  return shape;
}

// The kernels read jitter by its strides, so that one jitter of all images isn't copied.
Jitter jitter_of(const Tensor& shift, const Tensor& flip) {
  return {shift.const_data_ptr<int64_t>(), flip.const_data_ptr<bool>(), shift.stride(0),
          shift.stride(1), flip.stride(0)};
}

std::tuple<Tensor, Tensor> gather_patches(const Tensor& images_any, const Tensor& kept_any,
                                          const Tensor& shift, const Tensor& flip,
                                          int64_t patch_size) {
  const DeviceGuard guard(images_any.get_device_index());
  const Tensor images = ready(images_any), kept = ready(kept_any);
  const ImageShape shape = image_shape(images, kept, patch_size);
  const int64_t length = shape.channels * patch_size * patch_size;
  Tensor patches = new_empty(images, {shape.images, shape.kept, length});
  Tensor positions = new_empty(kept, {shape.images, shape.kept});
  STD_CUDA_CHECK(launch_gather_patches_fwd(
      images.element_size(), images.const_data_ptr(), indices(kept), jitter_of(shift, flip),
      patches.mutable_data_ptr(), positions.mutable_data_ptr<int64_t>(), shape,
      current_stream(images)));
  return {patches, positions};
}

Tensor gather_patches_backward(const Tensor& grad_any, const Tensor& kept_any, const Tensor& shift,
                               const Tensor& flip, int64_t patch_size, int64_t height,
                               int64_t width) {
  const DeviceGuard guard(grad_any.get_device_index());
  const Tensor grad = ready(grad_any), kept = ready(kept_any);
  const int64_t channels = grad.size(2) / (patch_size * patch_size);
  Tensor images = new_empty(grad, {grad.size(0), channels, height, width});
  STD_CUDA_CHECK(launch_gather_patches_bwd(
      grad.element_size(), grad.const_data_ptr(), indices(kept), jitter_of(shift, flip),
      images.mutable_data_ptr(), image_shape(images, kept, patch_size), current_stream(grad)));
  return images;
}

const bool* flags(const Optional& tensor) {
  return tensor ? tensor->const_data_ptr<bool>() : nullptr;
}

std::tuple<Tensor, Tensor> gather_sigmoid_patches(const Tensor& field_any, const Tensor& kept_any,
                                                  const Tensor& shift, const Tensor& flip,
                                                  const Tensor& mean_any, const Tensor& std_any,
                                                  const Optional& background_any,
                                                  const Optional& frozen_any, int64_t patch_size) {
  const DeviceGuard guard(field_any.get_device_index());
  const Tensor field = ready(field_any), kept = ready(kept_any);
  const Tensor mean = ready(mean_any), std = ready(std_any);
  const Optional background = ready(background_any), frozen = ready(frozen_any);
  const ImageShape shape = image_shape(field, kept, patch_size);
  const int64_t length = shape.channels * patch_size * patch_size;
  Tensor patches = new_empty(field, {shape.images, shape.kept, length});
  Tensor positions = new_empty(kept, {shape.images, shape.kept});
  STD_CUDA_CHECK(launch_gather_sigmoid_patches_fwd(
      type_of(field), field.const_data_ptr(), indices(kept), jitter_of(shift, flip),
      mean.const_data_ptr(), std.const_data_ptr(),
      background ? background->const_data_ptr() : nullptr, flags(frozen),
      patches.mutable_data_ptr(), positions.mutable_data_ptr<int64_t>(), shape,
      current_stream(field)));
  return {patches, positions};
}

Tensor gather_sigmoid_patches_backward(const Tensor& grad_any, const Tensor& field_any,
                                       const Tensor& kept_any, const Tensor& shift,
                                       const Tensor& flip, const Tensor& std_any,
                                       const Optional& frozen_any, int64_t patch_size) {
  const DeviceGuard guard(grad_any.get_device_index());
  const Tensor grad = ready(grad_any), field = ready(field_any), kept = ready(kept_any);
  const Tensor std = ready(std_any);
  const Optional frozen = ready(frozen_any);
  Tensor result = torch::stable::empty_like(field);
  STD_CUDA_CHECK(launch_gather_sigmoid_patches_bwd(
      type_of(grad), grad.const_data_ptr(), field.const_data_ptr(), indices(kept),
      jitter_of(shift, flip), std.const_data_ptr(), flags(frozen), result.mutable_data_ptr(),
      image_shape(field, kept, patch_size), current_stream(grad)));
  return result;
}

AttentionShape attention_shape(const Tensor& qkv, const Optional& token_index, bool backward) {
  const AttentionShape shape{qkv.size(0), qkv.size(1),
                             token_index ? token_index->size(1) : qkv.size(1), qkv.size(3),
                             qkv.size(4)};
  check_blocks(shape.images * shape.heads);
  STD_TORCH_CHECK(shape.width > 0 && shape.width % 8 == 0 && shape.width <= kMaxWidth,
                  "expected a head width that is a multiple of 8 up to ", kMaxWidth, ", got ",
                  shape.width);
  int64_t most = 0;
  STD_CUDA_CHECK(max_tokens(type_of(qkv), shape.width, backward, &most));
  STD_TORCH_CHECK(shape.tokens <= most, "expected at most ", most, " tokens of width ", shape.width,
                  " in ", torch::headeronly::toString(qkv.scalar_type()),
                  backward ? " for the gradient" : "", " in the shared memory of this GPU, got ",
                  shape.tokens);
  return shape;
}

std::tuple<Tensor, Tensor> gather_attention(const Tensor& qkv_any, const Optional& token_index_any,
                                            const Optional& lengths_any, bool importance) {
  const DeviceGuard guard(qkv_any.get_device_index());
  const Tensor qkv = ready(qkv_any);
  const Optional token_index = ready(token_index_any), lengths = ready(lengths_any);
  const AttentionShape shape = attention_shape(qkv, token_index, false);
  Tensor out = new_empty(qkv, {shape.images, shape.tokens, shape.heads * shape.width});
  Tensor row = new_empty(qkv, {shape.images, importance ? shape.tokens : 0});
  Tensor scratch =
      new_empty(qkv, {shape.images, shape.heads, importance ? shape.tokens : 0}, ScalarType::Float);
  STD_CUDA_CHECK(launch_gather_attention_fwd(
      type_of(qkv), qkv.const_data_ptr(), indices(token_index), indices(lengths),
      out.mutable_data_ptr(), scratch.mutable_data_ptr<float>(),
      importance ? row.mutable_data_ptr() : nullptr, shape, current_stream(qkv)));
  return {out, row};
}

Tensor gather_attention_backward(const Tensor& grad_any, const Tensor& qkv_any,
                                 const Optional& token_index_any, const Optional& lengths_any) {
  const DeviceGuard guard(qkv_any.get_device_index());
  const Tensor grad = ready(grad_any), qkv = ready(qkv_any);
  const Optional token_index = ready(token_index_any), lengths = ready(lengths_any);
  const AttentionShape shape = attention_shape(qkv, token_index, true);
  Tensor result = torch::stable::empty_like(qkv);
  STD_CUDA_CHECK(launch_gather_attention_bwd(
      type_of(qkv), grad.const_data_ptr(), qkv.const_data_ptr(), indices(token_index),
      indices(lengths), result.mutable_data_ptr(), shape, current_stream(qkv)));
  return result;
}

// Scratch memory of one byte for each patch of the images.
Tensor patch_mask(const Tensor& images, const Optional& active, int64_t patch_size) {
  const int64_t patches = active ? images.size(2) / patch_size * (images.size(3) / patch_size) : 0;
  return new_empty(images, {images.size(0), patches}, ScalarType::Byte);
}

Tensor total_variation(const Tensor& images_any, const Optional& active_any, int64_t patch_size) {
  const DeviceGuard guard(images_any.get_device_index());
  const Tensor images = ready(images_any);
  const Optional active = ready(active_any);
  Tensor mask = patch_mask(images, active, patch_size);
  Tensor partials = new_empty(images, {kVariationBlocks, kVariationSums}, ScalarType::Double);
  Tensor sums = new_empty(images, {3, 4}, ScalarType::Float);
  STD_CUDA_CHECK(launch_total_variation_fwd(
      type_of(images), images.const_data_ptr(), indices(active), mask.mutable_data_ptr<uint8_t>(),
      partials.mutable_data_ptr<double>(), sums.mutable_data_ptr<float>(),
      image_shape(images, active, patch_size), current_stream(images)));
  return sums;
}

Tensor total_variation_backward(const Tensor& grad_l1, const Tensor& grad_l2,
                                const Tensor& images_any, const Optional& active_any,
                                int64_t patch_size, const Tensor& sums_any) {
  const DeviceGuard guard(images_any.get_device_index());
  const Tensor images = ready(images_any), sums = ready(sums_any);
  const Optional active = ready(active_any);
  Tensor mask = patch_mask(images, active, patch_size);
  Tensor result = torch::stable::empty_like(images);
  STD_CUDA_CHECK(launch_total_variation_bwd(
      type_of(images), grad_l1.const_data_ptr<float>(), grad_l2.const_data_ptr<float>(),
      images.const_data_ptr(), indices(active), mask.mutable_data_ptr<uint8_t>(),
      sums.const_data_ptr<float>(), result.mutable_data_ptr(),
      image_shape(images, active, patch_size), current_stream(images)));
  return result;
}

NormShape norm_shape(const Tensor& x) {
  const NormShape shape{x.size(0), x.size(1), x.size(2) * x.size(3)};
  check_blocks(shape.images * shape.pixels);
  STD_TORCH_CHECK(shape.channels <= 65535, "expected at most 65535 channels, got ", shape.channels);
  return shape;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_matching(const Tensor& x_any,
                                                       const Tensor& running_mean_any,
                                                       const Tensor& running_var_any,
                                                       const Tensor& weight_any,
                                                       const Tensor& bias_any, double eps) {
  const DeviceGuard guard(x_any.get_device_index());
  const Tensor x = ready(x_any), running_mean = ready(running_mean_any);
  const Tensor running_var = ready(running_var_any), weight = ready(weight_any);
  const Tensor bias = ready(bias_any);
  const NormShape shape = norm_shape(x);
  Tensor partials = new_empty(x, {shape.channels, kNormSplits, 2}, ScalarType::Double);
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = new_empty(x, {shape.channels}, ScalarType::Float);
  Tensor var = new_empty(x, {shape.channels}, ScalarType::Float);
  STD_CUDA_CHECK(launch_batch_norm_matching_fwd(
      type_of(x), x.const_data_ptr(), running_mean.const_data_ptr(), running_var.const_data_ptr(),
      weight.const_data_ptr(), bias.const_data_ptr(), eps, partials.mutable_data_ptr<double>(),
      y.mutable_data_ptr(), mean.mutable_data_ptr<float>(), var.mutable_data_ptr<float>(), shape,
      current_stream(x)));
  return {y, mean, var};
}

Tensor batch_norm_matching_backward(const Tensor& grad_any, const Tensor& x_any,
                                    const Tensor& running_var_any, const Tensor& weight_any,
                                    double eps, const Tensor& offset_any, const Tensor& slope_any) {
  const DeviceGuard guard(x_any.get_device_index());
  const Tensor grad = ready(grad_any), x = ready(x_any), running_var = ready(running_var_any);
  const Tensor weight = ready(weight_any), offset = ready(offset_any), slope = ready(slope_any);
  Tensor result = torch::stable::empty_like(x);
  STD_CUDA_CHECK(launch_batch_norm_matching_bwd(
      type_of(x), grad.const_data_ptr(), x.const_data_ptr(), running_var.const_data_ptr(),
      weight.const_data_ptr(), eps, offset.const_data_ptr<float>(), slope.const_data_ptr<float>(),
      result.mutable_data_ptr(), norm_shape(x), current_stream(x)));
  return result;
}

// A strided tensor is copied to a dense one, changed there, and written back.
void adam_clamp_(Tensor images_any, const Tensor& grad_any, Tensor exp_avg_any,
                 Tensor exp_avg_sq_any, const Tensor& step, const Tensor& lr, double beta1,
                 double beta2, double weight_decay, const Tensor& low_any, const Tensor& high_any,
                 const Optional& active_any, int64_t patch_size) {
  const DeviceGuard guard(images_any.get_device_index());
  const Tensor images = ready(images_any), grad = ready(grad_any), exp_avg = ready(exp_avg_any);
  const Tensor exp_avg_sq = ready(exp_avg_sq_any), low = ready(low_any), high = ready(high_any);
  const Optional active = ready(active_any);
  STD_CUDA_CHECK(launch_adam_clamp(
      type_of(images), images.mutable_data_ptr(), grad.const_data_ptr(), exp_avg.mutable_data_ptr(),
      exp_avg_sq.mutable_data_ptr(),
      {step.const_data_ptr<int64_t>(), lr.const_data_ptr<double>(), beta1, beta2, weight_decay},
      low.const_data_ptr(), high.const_data_ptr(), indices(active),
      image_shape(images, active, patch_size), current_stream(images)));
  const auto write_back = [](Tensor& tensor, const Tensor& changed) {
    if (tensor.data_ptr() != changed.data_ptr()) torch::stable::copy_(tensor, changed);
  };
  write_back(images_any, images);
  write_back(exp_avg_any, exp_avg);
  write_back(exp_avg_sq_any, exp_avg_sq);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(smi_fast, CUDA, m) {
  m.impl("gather_patches", TORCH_BOX(&gather_patches));
  m.impl("gather_patches_backward", TORCH_BOX(&gather_patches_backward));
  m.impl("gather_sigmoid_patches", TORCH_BOX(&gather_sigmoid_patches));
  m.impl("gather_sigmoid_patches_backward", TORCH_BOX(&gather_sigmoid_patches_backward));
  m.impl("gather_attention", TORCH_BOX(&gather_attention));
  m.impl("gather_attention_backward", TORCH_BOX(&gather_attention_backward));
  m.impl("total_variation", TORCH_BOX(&total_variation));
  m.impl("total_variation_backward", TORCH_BOX(&total_variation_backward));
  m.impl("batch_norm_matching", TORCH_BOX(&batch_norm_matching));
  m.impl("batch_norm_matching_backward", TORCH_BOX(&batch_norm_matching_backward));
  m.impl("adam_clamp_", TORCH_BOX(&adam_clamp_));
}

}  // namespace smi_fast
