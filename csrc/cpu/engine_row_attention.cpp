#include <cmath>

#include "engine_steps_api.h"

namespace smi_fast {

// One image's keys and values in one head.
template <typename T>
struct KeysAndValues {
  const T* data;   // [N, 2, H, D] from the head on
  int64_t count;   // N
  int64_t width;   // D
  int64_t across;  // H·D

  // Elements before key or value j, the parts 0 and 1.
  int64_t offset(int64_t part, int64_t j) const { return (2 * j + part) * across; }
  const T* key(int64_t j) const { return data + offset(0, j); }
  const T* value(int64_t j) const { return data + offset(1, j); }
};

}  // namespace smi_fast

#define SMI_KERNEL "engine_row_attention_kernel.h"
#include "isa_dispatch.h"

namespace smi_fast {
namespace {

// The arguments of both directions; one task for each image and head.
template <typename T>
class Rows {
 public:
  Rows(const Tensor& q, const Tensor& q_bias, const Tensor& kv)
      : batch_(kv.size(0)),
        rows_(q.size(1)),
        count_(kv.size(1)),
        heads_(kv.size(3)),
        width_(kv.size(4)),
        q_(q.const_data_ptr<T>()),
        q_bias_(q_bias.const_data_ptr<T>()),
        kv_(kv.const_data_ptr<T>()),
        scale_(static_cast<T>(1 / std::sqrt(static_cast<double>(width_)))) {}

  int64_t count() const { return count_; }
  int64_t width() const { return width_; }
  T scale() const { return scale_; }

  // Elements before the task's part of kv; before its row r of [B, R, H·D]; of [B, H, R, N].
  int64_t kv_offset(int64_t task) const {
    return task / heads_ * count_ * 2 * heads_ * width_ + task % heads_ * width_;
  }
  int64_t row_offset(int64_t task, int64_t r) const {
    return ((task / heads_ * rows_ + r) * heads_ + task % heads_) * width_;
  }
  int64_t shares_offset(int64_t task, int64_t r) const { return (task * rows_ + r) * count_; }

  KeysAndValues<T> keys_and_values(int64_t task) const {
    return {kv_ + kv_offset(task), count_, width_, heads_ * width_};
  }

  // Runs run(task, r, query), the query biased and scaled.
  template <typename Run>
  void for_each(const Run& run) const {
    for_each_task(batch_ * heads_, 4 * rows_ * count_ * width_, [&](int64_t task) {
      std::vector<T> query(width_);
      for (int64_t r = 0; r < rows_; ++r) {
        const T *own = q_ + row_offset(task, r), *bias = q_bias_ + task % heads_ * width_;
        for (int64_t d = 0; d < width_; ++d) query[d] = (own[d] + bias[d]) * scale_;
        run(task, r, query.data());
      }
    });
  }

 private:
  int64_t batch_, rows_, count_, heads_, width_;
  const T* q_;       // [B, R, H·D]
  const T* q_bias_;  // [H·D]
  const T* kv_;      // [B, N, 2, H, D]
  T scale_;
};

void check(const Tensor& q, const Tensor& q_bias, const Tensor& kv) {
  STD_TORCH_CHECK(q.is_contiguous() && q_bias.is_contiguous() && kv.is_contiguous() &&
                      kv.size(0) == q.size(0) && kv.size(1) > 0 &&
                      kv.size(3) * kv.size(4) == q.size(2) && q_bias.numel() == q.size(2),
                  "expected contiguous q [B, R, H·D], q_bias [H·D] and kv [B, N, 2, H, D]");
}

}  // namespace

std::tuple<Tensor, Tensor> attend_rows(const Tensor& q, const Tensor& q_bias, const Tensor& kv) {
  check(q, q_bias, kv);
  const Tensor out = torch::stable::empty_like(q);
  const Tensor shares = torch::stable::new_empty(q, {q.size(0), kv.size(3), q.size(1), kv.size(1)});
  with_type_of(q, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = SMI_BEST(attend_row<T>);
    const Rows<T> tasks(q, q_bias, kv);
    T* to = out.mutable_data_ptr<T>();    // [B, R, H·D]
    T* p = shares.mutable_data_ptr<T>();  // [B, H, R, N]
    tasks.for_each([&](int64_t task, int64_t r, const T* query) {
      kernel(tasks.keys_and_values(task), query, p + tasks.shares_offset(task, r),
             to + tasks.row_offset(task, r));
    });
  });
  return {out, shares};
}

std::tuple<Tensor, Tensor> attend_rows_backward(const Tensor& grad_any, const Tensor& q,
                                                const Tensor& q_bias, const Tensor& kv,
                                                const Tensor& shares) {
  check(q, q_bias, kv);
  const Tensor grad = as_contiguous(grad_any);
  const Tensor d_q = torch::stable::new_zeros(q, q.sizes());
  const Tensor d_kv = torch::stable::new_zeros(kv, kv.sizes());
  with_type_of(q, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = SMI_BEST(attend_row_backward<T>);
    const Rows<T> tasks(q, q_bias, kv);
    const T* d_out = grad.const_data_ptr<T>();  // [B, R, H·D]
    const T* p = shares.const_data_ptr<T>();    // [B, H, R, N]
    T* d_query = d_q.mutable_data_ptr<T>();     // [B, R, H·D]
    T* d_keys = d_kv.mutable_data_ptr<T>();     // [B, N, 2, H, D]
    tasks.for_each([&](int64_t task, int64_t r, const T* query) {
      const int64_t at = tasks.row_offset(task, r);
      std::vector<T> d_p(tasks.count());
      kernel(tasks.keys_and_values(task), query, p + tasks.shares_offset(task, r), d_out + at,
             d_p.data(), d_query + at, d_keys + tasks.kv_offset(task));
      for (int64_t d = 0; d < tasks.width(); ++d) d_query[at + d] *= tasks.scale();
    });
  });
  return {d_q, d_kv};
}

STABLE_TORCH_LIBRARY_IMPL(smi_fast, CPU, m) {
  m.impl("attend_rows", TORCH_BOX(&attend_rows));
  m.impl("attend_rows_backward", TORCH_BOX(&attend_rows_backward));
}

}  // namespace smi_fast
