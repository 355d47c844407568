#include <cmath>
#include <memory>
#include <type_traits>
#include <utility>

#include "engine_steps_api.h"
#include "recycled_memory.h"

namespace smi_fast {

// The kept tokens of one image in one head.
template <typename T>
struct Head {
  const T* qkv;         // [N, 3, H, D] from the head on
  const T* q_bias;      // [D], added to each query, or null
  const int64_t* kept;  // [K], or null for all rows in order
  int64_t length;       // tokens that count
  int64_t width;        // D
  int64_t row;          // elements from one token of qkv to the next, 3·H·D
  int64_t part;         // from q to k, and to v, H·D
  int64_t out_row;      // H·D
  T scale;              // 1/√D

  // Elements before row i of q, k or v, the parts 0, 1 and 2.
  int64_t offset(int64_t part, int64_t i) const {
    return (kept ? kept[i] : i) * row + part * this->part;
  }
};

}  // namespace smi_fast

#define SMI_KERNEL "gather_attention_kernel.h"
#include "isa_dispatch.h"

namespace smi_fast {
namespace {

// A thread's working memory, aligned for vectors of any instruction set. It is kept, since fresh
// memory costs as much as the attention of a short sequence, and starts as zeros: what was never
// written is computed with too, and must be no slow denormal.
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

// The arguments of both directions, checked; one task for each image and head.
template <typename T>
class Heads {
 public:
  Heads(const Tensor& qkv, const Tensor* q_bias, const std::optional<Tensor>& kept,
        const std::optional<Tensor>& lengths)
      : batch_(qkv.size(0)),
        tokens_(qkv.size(1)),
        heads_(qkv.size(3)),
        width_(qkv.size(4)),
        count_(kept ? kept->size(1) : tokens_),
        qkv_(qkv.const_data_ptr<T>()),
        q_bias_(q_bias ? q_bias->const_data_ptr<T>() : nullptr),
        kept_(kept ? kept->const_data_ptr<int64_t>() : nullptr) {
    for (int64_t b = 0; b < batch_; ++b) {
      const int64_t length =
          lengths ? lengths->const_data_ptr<int64_t>()[b * lengths->stride(0)] : count_;
      lengths_.push_back(std::clamp<int64_t>(length, 0, count_));
    }
  }

  int64_t batch() const { return batch_; }
  int64_t count() const { return count_; }
  int64_t heads() const { return heads_; }
  int64_t out_row() const { return heads_ * width_; }
  int64_t length(int64_t image) const { return lengths_[image]; }

  // Elements before the task's part of qkv, and of [B, K, H·D].
  int64_t qkv_offset(int64_t task) const {
    return task / heads_ * tokens_ * 3 * out_row() + task % heads_ * width_;
  }
  int64_t out_offset(int64_t task) const {
    return task / heads_ * count_ * out_row() + task % heads_ * width_;
  }

  Head<T> head(int64_t task) const {
    const int64_t image = task / heads_;
    return {qkv_ + qkv_offset(task),
            q_bias_ ? q_bias_ + task % heads_ * width_ : nullptr,
            kept_ ? kept_ + image * count_ : nullptr,
            lengths_[image],
            width_,
            3 * out_row(),
            out_row(),
            out_row(),
            static_cast<T>(1 / std::sqrt(static_cast<double>(width_)))};
  }

  // Runs run(task, buffer), the buffer a thread's own.
  template <typename Run>
  void for_each(const Run& run) const {
    const int64_t size = SMI_BEST(workspace_size<T>)(count_, width_);
    // Products of that many multiplications take as long as kGrain elements of a pixel op.
    const int64_t grain = 16 * kGrain / std::max<int64_t>(1, count_ * count_ * width_) + 1;
    torch::stable::parallel_for(0, batch_ * heads_, grain, [&](int64_t begin, int64_t end) {
      T* const buffer = working_memory<T>(size);
      for (int64_t task = begin; task < end; ++task) run(task, buffer);
    });
  }

 private:
  int64_t batch_, tokens_, heads_, width_, count_;
  const T* qkv_;         // [B, N, 3, H, D]
  const T* q_bias_;      // [H·D], or null
  const int64_t* kept_;  // [B, K], or null
  std::vector<int64_t> lengths_;
};

std::optional<Tensor> checked_rows(const std::optional<Tensor>& kept, const Tensor& qkv) {
  if (!kept) return std::nullopt;
  return checked_kept(*kept, qkv.size(1));
}

template <typename T>
void forward(const Heads<T>& tasks, T* out, T* first_rows) {
  const auto kernel = SMI_BEST(attend<T>);
  tasks.for_each([&](int64_t task, T* buffer) {
    const Head<T> head = tasks.head(task);
    T* own = out + tasks.out_offset(task);
    kernel(head, buffer, own, first_rows ? first_rows + task * tasks.count() : nullptr);
    for (int64_t i = head.length; i < tasks.count(); ++i) {
      std::fill_n(own + i * head.out_row, head.width, T{0});
    }
  });
}

template <typename T>
void backward(const Heads<T>& tasks, const T* grad, T* d_qkv) {
  const auto kernel = SMI_BEST(attend_backward<T>);
  tasks.for_each([&](int64_t task, T* buffer) {
    const Head<T> head = tasks.head(task);
    T* own = d_qkv + tasks.qkv_offset(task);
    kernel(head, buffer, grad + tasks.out_offset(task), own);
    for (int64_t i = head.length; i < tasks.count(); ++i) {
      for (int64_t part = 0; part < 3; ++part) {
        std::fill_n(own + head.offset(part, i), head.width, T{0});
      }
    }
  });
}

// importance [B, K] = the mean over heads of the first rows [B, H, K].
template <typename T>
void mean_over_heads(const std::vector<T>& first_rows, int64_t heads, int64_t count,
                     const Tensor& importance) {
  T* scores = importance.mutable_data_ptr<T>();  // [B, K]
  for (int64_t i = 0; i < importance.numel(); ++i) {
    double sum = 0;
    for (int64_t h = 0; h < heads; ++h) {
      sum += first_rows[(i / count * heads + h) * count + i % count];
    }
    scores[i] = static_cast<T>(sum / static_cast<double>(heads));
  }
}

std::tuple<Tensor, Tensor> gather_attention(const Tensor& qkv_any,
                                            const std::optional<Tensor>& kept_any,
                                            const std::optional<Tensor>& lengths,
                                            bool want_importance) {
  const Tensor qkv = as_contiguous(qkv_any);
  const std::optional<Tensor> kept = checked_rows(kept_any, qkv);
  const int64_t batch = qkv.size(0), heads = qkv.size(3), width = qkv.size(4);
  const int64_t count = kept ? kept->size(1) : qkv.size(1);
  const Tensor out = new_result(qkv, {batch, count, heads * width});
  const Tensor importance = torch::stable::new_empty(qkv, {batch, want_importance ? count : 0});
  with_type_of(qkv, [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> first_rows(want_importance ? batch * heads * count : 0);  // [B, H, K]
    forward(Heads<T>(qkv, nullptr, kept, lengths), out.mutable_data_ptr<T>(),
            want_importance ? first_rows.data() : nullptr);
    mean_over_heads(first_rows, heads, count, importance);
  });
  return {out, importance};
}

Tensor gather_attention_backward(const Tensor& grad_any, const Tensor& qkv_any,
                                 const std::optional<Tensor>& kept_any,
                                 const std::optional<Tensor>& lengths) {
  const Tensor grad = as_contiguous(grad_any), qkv = as_contiguous(qkv_any);
  const std::optional<Tensor> kept = checked_rows(kept_any, qkv);
  const Tensor result =
      kept ? torch::stable::new_zeros(qkv, qkv.sizes()) : new_result(qkv, sizes_of(qkv));
  with_type_of(qkv, [&](auto zero) {
    using T = decltype(zero);
    backward(Heads<T>(qkv, nullptr, kept, lengths), grad.const_data_ptr<T>(),
             result.mutable_data_ptr<T>());
  });
  return result;
}

}  // namespace

// All tokens of qkv [B, N, 3, H, D] into out [B, N, H·D], q_bias [H·D] added to their queries.
void attend_(const Tensor& qkv, const Tensor& q_bias, Tensor out) {
  STD_TORCH_CHECK(qkv.is_contiguous() && q_bias.is_contiguous() && out.is_contiguous() &&
                      3 * out.numel() == qkv.numel(),
                  "expected contiguous qkv and out, a third of its size");
  with_type_of(qkv, [&](auto zero) {
    using T = decltype(zero);
    forward<T>(Heads<T>(qkv, &q_bias, std::nullopt, std::nullopt), out.mutable_data_ptr<T>(),
               nullptr);
  });
}

void attend_backward_(const Tensor& grad, const Tensor& qkv, const Tensor& q_bias, Tensor d_qkv) {
  STD_TORCH_CHECK(qkv.is_contiguous() && q_bias.is_contiguous() && grad.is_contiguous() &&
                      d_qkv.is_contiguous() && 3 * grad.numel() == qkv.numel() &&
                      d_qkv.numel() == qkv.numel(),
                  "expected contiguous d_qkv like qkv, and grad, a third of its size");
  with_type_of(qkv, [&](auto zero) {
    using T = decltype(zero);
    backward(Heads<T>(qkv, &q_bias, std::nullopt, std::nullopt), grad.const_data_ptr<T>(),
             d_qkv.mutable_data_ptr<T>());
  });
}

STABLE_TORCH_LIBRARY_IMPL(smi_fast, CPU, m) {
  m.impl("gather_attention", TORCH_BOX(&gather_attention));
  m.impl("gather_attention_backward", TORCH_BOX(&gather_attention_backward));
  m.impl("attend_", TORCH_BOX(&attend_));
  m.impl("attend_backward_", TORCH_BOX(&attend_backward_));
}

}  // namespace smi_fast
