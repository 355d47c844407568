#include <cmath>
#include <memory>
#include <type_traits>
#include <utility>

#include "engine_steps_api.h"
#include "recycled_memory.h"

namespace smi_fast {

// The tokens of one (image, head) that attend to each other.
template <typename S>
struct Head {
  const S* qkv;                // [N, 3, H, D], starting at this head
  const Computed<S>* q_bias;   // [D], added to each query, or null
  const int64_t* token_index;  // [K], or null: all rows in order
  int64_t length;              // valid tokens, at most K
  int64_t width;               // D
  int64_t row_stride;          // 3·H·D, from one token of qkv to the next
  int64_t part_stride;         // H·D, from q to k and from k to v
  int64_t out_stride;          // H·D
  Computed<S> scale;           // 1/√D

  // Offset of the i-th selected row of q, k or v (part 0, 1 or 2).
  int64_t offset(int64_t part, int64_t i) const {
    return (token_index ? token_index[i] : i) * row_stride + part * part_stride;
  }
};

}  // namespace smi_fast

#define SMI_KERNEL_HEADER "gather_attention_kernel.h"
#define SMI_KERNEL_NAMESPACE gather_attention
#define SMI_BFLOAT16_KERNEL_HEADER "gather_attention_pairs_kernel.h"
#include "isa_dispatch.h"

namespace smi_fast {
namespace {

// Scratch memory of this thread, aligned for vectors of any instruction set.
// - It is kept between calls, because allocating it costs as much as the attention of a short
//   sequence.
// - It starts as zeros, because padding lanes are computed too, and denormals in them would be
//   slow.
template <typename T>
T* working_memory(int64_t size) {
  constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* data) const { ::operator delete(data, kAlignment); }
  };
  thread_local std::unique_ptr<T, Free> memory;
  thread_local int64_t held = 0;
  if (held < size) {
    memory.reset(static_cast<T*>(::operator new(size * sizeof(T), kAlignment)));
    std::fill_n(memory.get(), size, T{0});
    held = size;
  }
  return memory.get();
}

// The kernels of a storage type on this machine, and the size of their buffer for a number of
// tokens and a width.
template <typename S>
struct Kernels {
  using T = Computed<S>;
  int64_t (*workspace_size)(int64_t length, int64_t width);
  void (*attend)(const Head<S>&, T* buffer, S* out, T* importance);
  void (*attend_backward)(const Head<S>&, T* buffer, const S* d_out, S* d_qkv);
};

template <typename S>
Kernels<S> kernels_of([[maybe_unused]] int64_t width) {
#if SMI_X86_DISPATCH
  if constexpr (std::is_same_v<S, BFloat16>) {
    static const bool has_pairs = isa() == Isa::kAvx512Bf16;
    using namespace avx512_bf16::gather_attention;
    if (has_pairs && width % 32 == 0) {
      return {&pairs_workspace_size, &attend_pairs, &attend_pairs_backward};
    }
  }
#endif
  return {SMI_BEST(workspace_size<S>), SMI_BEST(attend<S>), SMI_BEST(attend_backward<S>)};
}

// Arguments of forward and backward, split into one task for each (image, head).
template <typename S>
class Heads {
 public:
  using T = Computed<S>;

  // The images of a batch, of which the selected tokens attend to each other, at most `lengths`.
  Heads(const Tensor& qkv, const std::optional<Tensor>& token_index,
        const std::optional<Tensor>& lengths)
      : Heads(qkv, nullptr, token_index ? token_index->size(1) : qkv.size(1)) {
    if (token_index) token_index_ = token_index->const_data_ptr<int64_t>();
    for (int64_t b = 0; b < qkv.size(0); ++b) {
      const int64_t length =
          lengths ? lengths->const_data_ptr<int64_t>()[b * lengths->stride(0)] : count_;
      images_.push_back({b * qkv.size(1), b * count_, std::clamp<int64_t>(length, 0, count_)});
    }
    padded_ = true;
  }

  // Images whose tokens are concatenated: those of image b begin at offsets[b].
  Heads(const Tensor& qkv, const Tensor& q_bias, const std::vector<int64_t>& offsets)
      : Heads(qkv, q_bias.const_data_ptr<T>(), int64_t{0}) {
    for (size_t b = 0; b + 1 < offsets.size(); ++b) {
      images_.push_back({offsets[b], offsets[b], offsets[b + 1] - offsets[b]});
      count_ = std::max(count_, images_.back().length);
    }
  }

  // The most tokens of an image.
  int64_t count() const { return count_; }
  int64_t width() const { return width_; }
  int64_t out_stride() const { return heads_ * width_; }
  // Tokens of the task's image that have a place in the output.
  int64_t places(int64_t task) const { return padded_ ? count_ : images_[task / heads_].length; }

  // Offset of the task's head in qkv [B, N, 3, H, D].
  int64_t qkv_offset(int64_t task) const {
    return images_[task / heads_].row * 3 * out_stride() + task % heads_ * width_;
  }
  // Offset of the task's head in [B, K, H·D].
  int64_t out_offset(int64_t task) const {
    return images_[task / heads_].out_row * out_stride() + task % heads_ * width_;
  }

  Head<S> head(int64_t task) const {
    const int64_t image = task / heads_;
    return {qkv_ + qkv_offset(task),
            q_bias_ ? q_bias_ + task % heads_ * width_ : nullptr,
            token_index_ ? token_index_ + image * count_ : nullptr,
            images_[image].length,
            width_,
            3 * out_stride(),
            out_stride(),
            out_stride(),
            static_cast<T>(1 / std::sqrt(static_cast<double>(width_)))};
  }

  // Calls run(task, buffer) for each task, where the buffer is scratch memory of the thread.
  template <typename Run>
  void for_each(const Run& run) const {
    const int64_t size = kernels_of<S>(width_).workspace_size(count_, width_);
    // 16 · kGrain multiplications of a GEMM take as long as kGrain elements of a pixel op.
    const int64_t grain = 16 * kGrain / std::max<int64_t>(1, count_ * count_ * width_) + 1;
    const auto count = static_cast<int64_t>(images_.size()) * heads_;
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      T* const buffer = working_memory<T>(size);
      for (int64_t task = begin; task < end; ++task) run(task, buffer);
    });
  }

 private:
  struct Image {
    int64_t row, out_row;  // of its first token, in qkv and in the output
    int64_t length;
  };

  Heads(const Tensor& qkv, const T* q_bias, int64_t count)
      : heads_(qkv.size(3)),
        width_(qkv.size(4)),
        count_(count),
        qkv_(qkv.const_data_ptr<S>()),
        q_bias_(q_bias) {}

  int64_t heads_, width_, count_;
  const S* qkv_;                          // [B, N, 3, H, D]
  const T* q_bias_;                       // [H·D], or null
  const int64_t* token_index_ = nullptr;  // [B, K], or null
  bool padded_ = false;  // whether tokens beyond an image's length have a place in the output
  std::vector<Image> images_;
};

std::optional<Tensor> checked_token_index(const std::optional<Tensor>& token_index,
                                          const Tensor& qkv) {
  if (!token_index) return std::nullopt;
  return checked_indices("token_index", *token_index, qkv.size(1));
}

template <typename S>
void forward(const Heads<S>& tasks, S* out, Computed<S>* head_importance) {
  const auto kernel = kernels_of<S>(tasks.width()).attend;
  tasks.for_each([&](int64_t task, Computed<S>* buffer) {
    const Head<S> head = tasks.head(task);
    S* own = out + tasks.out_offset(task);
    kernel(head, buffer, own, head_importance ? head_importance + task * tasks.count() : nullptr);
    for (int64_t i = head.length; i < tasks.places(task); ++i) {
      std::fill_n(own + i * head.out_stride, head.width, S{});
    }
  });
}

template <typename S>
void backward(const Heads<S>& tasks, const S* grad, S* d_qkv) {
  const auto kernel = kernels_of<S>(tasks.width()).attend_backward;
  tasks.for_each([&](int64_t task, Computed<S>* buffer) {
    const Head<S> head = tasks.head(task);
    S* own = d_qkv + tasks.qkv_offset(task);
    kernel(head, buffer, grad + tasks.out_offset(task), own);
    for (int64_t i = head.length; i < tasks.places(task); ++i) {
      for (int64_t part = 0; part < 3; ++part) {
        std::fill_n(own + head.offset(part, i), head.width, S{});
      }
    }
  });
}

// importance [B, K] = the mean over heads of head_importance [B, H, K], the probabilities of the
// first token.
template <typename T>
void mean_over_heads(const std::vector<T>& head_importance, int64_t heads, int64_t count,
                     const Tensor& importance) {
  T* scores = importance.mutable_data_ptr<T>();  // [B, K]
  for (int64_t i = 0; i < importance.numel(); ++i) {
    double sum = 0;
    for (int64_t h = 0; h < heads; ++h) {
      sum += head_importance[(i / count * heads + h) * count + i % count];
    }
    scores[i] = static_cast<T>(sum / static_cast<double>(heads));
  }
}

std::tuple<Tensor, Tensor> gather_attention(const Tensor& qkv_any,
                                            const std::optional<Tensor>& token_index_any,
                                            const std::optional<Tensor>& lengths,
                                            bool want_importance) {
  const Tensor qkv = as_contiguous(qkv_any);
  const std::optional<Tensor> token_index = checked_token_index(token_index_any, qkv);
  const int64_t batch = qkv.size(0), heads = qkv.size(3), width = qkv.size(4);
  const int64_t count = token_index ? token_index->size(1) : qkv.size(1);
  const Tensor out = new_result(qkv, {batch, count, heads * width});
  const Tensor importance = torch::stable::new_empty(qkv, {batch, want_importance ? count : 0});
  with_type_of(qkv, [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> head_importance(want_importance ? batch * heads * count : 0);  // [B, H, K]
    forward(Heads<T>(qkv, token_index, lengths), out.mutable_data_ptr<T>(),
            want_importance ? head_importance.data() : nullptr);
    mean_over_heads(head_importance, heads, count, importance);
  });
  return {out, importance};
}

Tensor gather_attention_backward(const Tensor& grad_any, const Tensor& qkv_any,
                                 const std::optional<Tensor>& token_index_any,
                                 const std::optional<Tensor>& lengths) {
  const Tensor grad = as_contiguous(grad_any), qkv = as_contiguous(qkv_any);
  const std::optional<Tensor> token_index = checked_token_index(token_index_any, qkv);
  const Tensor result =
      token_index ? torch::stable::new_zeros(qkv, qkv.sizes()) : new_result(qkv, sizes_of(qkv));
  with_type_of(qkv, [&](auto zero) {
    using T = decltype(zero);
    backward(Heads<T>(qkv, token_index, lengths), grad.const_data_ptr<T>(),
             result.mutable_data_ptr<T>());
  });
  return result;
}

}  // namespace

std::vector<int64_t> offsets_of(const Tensor& x, const std::optional<Tensor>& given) {
  const int64_t rows = x.size(0) * x.size(1);
  std::vector<int64_t> offsets;
  if (!given) {
    for (int64_t b = 0; b <= x.size(0); ++b) offsets.push_back(b * x.size(1));
    return offsets;
  }
  const int64_t* data = data_of<int64_t>(*given, given->size(0));
  offsets.assign(data, data + given->size(0));
  STD_TORCH_CHECK(!offsets.empty() && offsets.front() == 0 && offsets.back() == rows &&
                      std::is_sorted(offsets.begin(), offsets.end()),
                  "expected ascending offsets from 0 to ", rows);
  return offsets;
}

// Writes the attention among all tokens of each image of qkv [B, N, 3, H, D] to out [B, N, H·D].
// q_bias [H·D] is added to the queries. With offsets, images are not N tokens long: their tokens
// are concatenated, and those of image b are from offsets[b] up to offsets[b + 1].
void attend_(const Tensor& qkv, const Tensor& q_bias, Tensor out,
             const std::optional<Tensor>& offsets) {
  STD_TORCH_CHECK(qkv.is_contiguous() && q_bias.is_contiguous() && out.is_contiguous() &&
                      3 * out.numel() == qkv.numel(),
                  "expected contiguous qkv, q_bias and out, with out a third the size of qkv");
  with_stored_type_of(qkv, [&](auto zero) {
    using S = decltype(zero);
    forward<S>(Heads<S>(qkv, q_bias, offsets_of(qkv, offsets)), out.mutable_data_ptr<S>(), nullptr);
  });
}

// Writes the gradient of qkv to d_qkv, given that of out.
void attend_backward_(const Tensor& grad, const Tensor& qkv, const Tensor& q_bias, Tensor d_qkv,
                      const std::optional<Tensor>& offsets) {
  STD_TORCH_CHECK(qkv.is_contiguous() && q_bias.is_contiguous() && grad.is_contiguous() &&
                      d_qkv.is_contiguous() && 3 * grad.numel() == qkv.numel() &&
                      d_qkv.numel() == qkv.numel(),
                  "expected contiguous grad, qkv, q_bias and d_qkv, with d_qkv the size of qkv "
                  "and grad a third of it");
  with_stored_type_of(qkv, [&](auto zero) {
    using S = decltype(zero);
    backward(Heads<S>(qkv, q_bias, offsets_of(qkv, offsets)), grad.const_data_ptr<S>(),
             d_qkv.mutable_data_ptr<S>());
  });
}

STABLE_TORCH_LIBRARY_IMPL(smi_fast, CPU, m) {
  m.impl("gather_attention", TORCH_BOX(&gather_attention));
  m.impl("gather_attention_backward", TORCH_BOX(&gather_attention_backward));
  m.impl("attend_", TORCH_BOX(&attend_));
  m.impl("attend_backward_", TORCH_BOX(&attend_backward_));
}

}  // namespace smi_fast
