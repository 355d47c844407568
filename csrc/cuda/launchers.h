// The interface of the CUDA kernels, for the bindings or any program that has device pointers. It
// needs no header of torch.
//
// - Every tensor is contiguous.
// - A pointer may be null if the call doesn't need it.
// - Launchers only enqueue work on the stream.
// - Results are bitwise reproducible, because no kernel adds atomically.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace smi_fast {

enum class Type { kFloat, kHalf, kBFloat16 };

constexpr int64_t bytes_of(Type type) { return type == Type::kFloat ? 4 : 2; }

// Attention among K of the N rows of each of B images.
struct AttentionShape {
  int64_t images, rows, tokens, heads, width;  // B, N, K, H, D
};

// Images, and K kept patches of P x P pixels of each. Without `kept`, K and P are ignored.
struct ImageShape {
  int64_t images, channels, height, width;  // B, C, H, W
  int64_t kept, patch;                      // K, P
};

// An index outside [0, N) reads as a row of NaN, and no gradient is written for it. Widths are
// multiples of 8 up to kMaxWidth.
constexpr int64_t kMaxWidth = 128;
cudaError_t launch_gather_attention_fwd(Type type, const void* qkv,  // [B, N, 3, H, D]
                                        const int64_t* token_index,  // [B, K] or null: K = N
                                        const int64_t* lengths,      // [B] or null
                                        void* out,                   // [B, K, H*D]
                                        float* head_importance,      // scratch [B, H, K]
                                        void* importance,            // [B, K] or null
                                        AttentionShape shape, cudaStream_t stream);
cudaError_t launch_gather_attention_bwd(Type type, const void* grad,  // [B, K, H*D]
                                        const void* qkv,              // [B, N, 3, H, D]
                                        const int64_t* token_index,   // [B, K] or null: K = N
                                        const int64_t* lengths,       // [B] or null
                                        void* grad_qkv,               // [B, N, 3, H, D]
                                        AttentionShape shape, cudaStream_t stream);
// The most tokens whose rows fit in the shared memory of one block of the current device.
cudaError_t max_tokens(Type type, int64_t width, bool backward, int64_t* tokens);

// The jitter of each image; strides count elements, and those of images with the same jitter are 0.
struct Jitter {
  const int64_t* shift;  // [B, 2]
  const bool* flip;      // [B]
  int64_t shift_image, shift_axis, flip_image;
};

// A patch outside the grid reads as NaN at position -1, and its gradient is dropped. Elements of
// any type are copied as they are. Their size is 2, 4 or 8 bytes.
cudaError_t launch_gather_patches_fwd(int64_t element_bytes, const void* images,  // [B, C, H, W]
                                      const int64_t* kept,                        // [B, K]
                                      Jitter jitter,
                                      void* patches,       // [B, K, C*P*P]
                                      int64_t* positions,  // [B, K]
                                      ImageShape shape, cudaStream_t stream);
cudaError_t launch_gather_patches_bwd(int64_t element_bytes, const void* grad,  // [B, K, C*P*P]
                                      const int64_t* kept,                      // [B, K]
                                      Jitter jitter,
                                      void* grad_images,  // [B, C, H, W]
                                      ImageShape shape, cudaStream_t stream);

// The images are (sigmoid(field) - mean) / std, and `background` in frozen patches. A patch outside
// the grid reads as NaN at position -1, and its gradient is dropped.
cudaError_t launch_gather_sigmoid_patches_fwd(Type type, const void* field,     // [B, C, H, W]
                                              const int64_t* kept,              // [B, K]
                                              Jitter jitter, const void* mean,  // [C]
                                              const void* std,                  // [C]
                                              const void* background,  // [B, C, H, W] or null
                                              const bool* frozen,      // [B, H/P, W/P] or null
                                              void* patches,           // [B, K, C*P*P]
                                              int64_t* positions,      // [B, K]
                                              ImageShape shape, cudaStream_t stream);
cudaError_t launch_gather_sigmoid_patches_bwd(Type type, const void* grad,     // [B, K, C*P*P]
                                              const void* field,               // [B, C, H, W]
                                              const int64_t* kept,             // [B, K]
                                              Jitter jitter, const void* std,  // [C]
                                              const bool* frozen,  // [B, H/P, W/P] or null
                                              void* grad_field,    // [B, C, H, W]
                                              ImageShape shape, cudaStream_t stream);

// A patch outside the grid counts as not active. B*C*H < 2^31.
constexpr int64_t kVariationBlocks = 1024, kVariationSums = 12;
cudaError_t launch_total_variation_fwd(Type type, const void* images,  // [B, C, H, W]
                                       const int64_t* active,          // [B, K] or null
                                       uint8_t* mask,     // scratch [B, H/P * W/P], with active
                                       double* partials,  // scratch [kVariationBlocks, 12]
                                       float* sums,       // [3, 4]
                                       ImageShape shape, cudaStream_t stream);
cudaError_t launch_total_variation_bwd(Type type, const float* grad_l1,  // []
                                       const float* grad_l2,             // []
                                       const void* images,               // [B, C, H, W]
                                       const int64_t* active,            // [B, K] or null
                                       uint8_t* mask,      // scratch [B, H/P * W/P], with active
                                       const float* sums,  // [3, 4]
                                       void* grad_images,  // [B, C, H, W]
                                       ImageShape shape, cudaStream_t stream);

// pixels = H*W, and B*pixels < 2^31.
struct NormShape {
  int64_t images, channels, pixels;
};
constexpr int64_t kNormSplits = 64;
cudaError_t launch_batch_norm_matching_fwd(Type type, const void* x,      // [B, C, H*W]
                                           const void* running_mean,      // [C]
                                           const void* running_var,       // [C]
                                           const void* weight,            // [C]
                                           const void* bias,              // [C]
                                           double eps, double* partials,  // scratch [C, splits, 2]
                                           void* y,                       // [B, C, H*W]
                                           float* mean,                   // [C]
                                           float* var,                    // [C]
                                           NormShape shape, cudaStream_t stream);
cudaError_t launch_batch_norm_matching_bwd(Type type, const void* grad,      // [B, C, H*W]
                                           const void* x,                    // [B, C, H*W]
                                           const void* running_var,          // [C]
                                           const void* weight,               // [C]
                                           double eps, const float* offset,  // [C]
                                           const float* slope,               // [C]
                                           void* grad_x,                     // [B, C, H*W]
                                           NormShape shape, cudaStream_t stream);

// A patch outside the grid is ignored.
struct AdamStep {
  const int64_t* step;  // [], on the device
  const double* lr;     // [], on the device
  double beta1, beta2, weight_decay;
};
cudaError_t launch_adam_clamp(Type type, void* images,         // [B, C, H, W], changed
                              const void* grad,                // [B, C, H, W]
                              void* exp_avg,                   // [B, C, H, W], changed
                              void* exp_avg_sq,                // [B, C, H, W], changed
                              AdamStep adam, const void* low,  // [C]
                              const void* high,                // [C]
                              const int64_t* active,           // [B, K] or null
                              ImageShape shape, cudaStream_t stream);

}  // namespace smi_fast
