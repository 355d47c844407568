#include <cmath>

#include "engine_steps_api.h"

namespace smi_fast {

// Keys and values of one (image, head).
template <typename T>
struct KeysAndValues {
  const T* data;        // [N, 2, H, D], starting at this head
  int64_t count;        // N
  int64_t width;        // D
  int64_t part_stride;  // H·D, from a key to its value

  // Offset of key j (part 0) or value j (part 1).
  int64_t offset(int64_t part, int64_t j) const { return (2 * j + part) * part_stride; }
  const T* key(int64_t j) const { return data + offset(0, j); }
  const T* value(int64_t j) const { return data + offset(1, j); }
};

}  // namespace smi_fast

#define SMI_KERNEL_HEADER "engine_row_attention_kernel.h"
#define SMI_KERNEL_NAMESPACE engine_row_attention
#include "isa_dispatch.h"

namespace smi_fast {
namespace {

// Arguments of forward and backward, split into one task for each (image, head).
template <typename T>
class RowTasks {
 public:
  RowTasks(const Tensor& q, const Tensor& q_bias, const Tensor& kv,
           const std::vector<int64_t>& offsets)
      : offsets_(offsets),
        rows_(q.size(1)),
        stride_(kv.size(1)),
        heads_(kv.size(3)),
        width_(kv.size(4)),
        q_(q.const_data_ptr<T>()),
        q_bias_(q_bias.const_data_ptr<T>()),
        kv_(kv.const_data_ptr<T>()),
        scale_(static_cast<T>(1 / std::sqrt(static_cast<double>(width_)))) {}

  int64_t width() const { return width_; }
  T scale() const { return scale_; }

  // Tokens of the task's image.
  int64_t count(int64_t task) const { return offsets_[task / heads_ + 1] - begin(task); }
  // Offset of the task's head in kv [B, N, 2, H, D].
  int64_t kv_offset(int64_t task) const {
    return begin(task) * 2 * heads_ * width_ + task % heads_ * width_;
  }
  // Offset of the task's row r in [B, R, H·D].
  int64_t row_offset(int64_t task, int64_t r) const {
    return ((task / heads_ * rows_ + r) * heads_ + task % heads_) * width_;
  }
  // Offset of the task's row r in [B, H, R, N], where concatenated images share the last axis.
  int64_t probabilities_offset(int64_t task, int64_t r) const {
    const int64_t entry = begin(task) / stride_;
    return ((entry * heads_ + task % heads_) * rows_ + r) * stride_ + begin(task) % stride_;
  }

  KeysAndValues<T> keys_and_values(int64_t task) const {
    return {kv_ + kv_offset(task), count(task), width_, heads_ * width_};
  }

  // Calls run(task, r, query) for each row r. The query has its bias and is scaled.
  template <typename Run>
  void for_each(const Run& run) const {
    const int64_t images = static_cast<int64_t>(offsets_.size()) - 1;
    const int64_t mean = offsets_.back() / std::max<int64_t>(1, images);
    for_each_task(images * heads_, 4 * rows_ * mean * width_, [&](int64_t task) {
      std::vector<T> query(width_);
      for (int64_t r = 0; r < rows_; ++r) {
        const T *own = q_ + row_offset(task, r), *bias = q_bias_ + task % heads_ * width_;
        for (int64_t d = 0; d < width_; ++d) query[d] = (own[d] + bias[d]) * scale_;
        run(task, r, query.data());
      }
    });
  }

 private:
  // Where the task's image begins among all B·N tokens.
  int64_t begin(int64_t task) const { return offsets_[task / heads_]; }

  const std::vector<int64_t>& offsets_;
  int64_t rows_, stride_, heads_, width_;  // R, N, H, D
  const T* q_;                             // [B, R, H·D]
  const T* q_bias_;                        // [H·D]
  const T* kv_;                            // [B, N, 2, H, D]
  T scale_;
};

// The offsets of the images, after a check of all arguments.
std::vector<int64_t> checked_offsets(const Tensor& q, const Tensor& q_bias, const Tensor& kv,
                                     const std::optional<Tensor>& given) {
  STD_TORCH_CHECK(q.is_contiguous() && q_bias.is_contiguous() && kv.is_contiguous() &&
                      kv.size(3) * kv.size(4) == q.size(2) && q_bias.numel() == q.size(2),
                  "expected contiguous q [B, R, H·D], q_bias [H·D] and kv [B, N, 2, H, D]");
  std::vector<int64_t> offsets = offsets_of(kv, given);
  const auto images = static_cast<int64_t>(offsets.size()) - 1;
  STD_TORCH_CHECK(images == q.size(0), "expected keys of ", q.size(0), " images, got ", images);
  for (int64_t b = 0; b < images; ++b) {
    STD_TORCH_CHECK(offsets[b] < offsets[b + 1], "expected a token in each image, got none in ", b);
  }
  return offsets;
}

}  // namespace

// Attention of the queries q + q_bias [B, R, H·D] among kv [B, N, 2, H, D]. Returns the output
// [B, R, H·D] and the probabilities [B, H, R, N]. With given offsets, kv [1, N, 2, H, D] and the
// probabilities [1, H, R, N] concatenate the tokens of all images, see attend_().
std::tuple<Tensor, Tensor> attend_rows(const Tensor& q, const Tensor& q_bias, const Tensor& kv,
                                       const std::optional<Tensor>& given) {
  const std::vector<int64_t> offsets = checked_offsets(q, q_bias, kv, given);
  const Tensor out = torch::stable::empty_like(q);
  const Tensor probabilities =
      torch::stable::new_empty(q, {kv.size(0), kv.size(3), q.size(1), kv.size(1)});
  with_type_of(q, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = SMI_BEST(attend_row<T>);
    const RowTasks<T> tasks(q, q_bias, kv, offsets);
    T* to = out.mutable_data_ptr<T>();           // [B, R, H·D]
    T* p = probabilities.mutable_data_ptr<T>();  // [B, H, R, N]
    tasks.for_each([&](int64_t task, int64_t r, const T* query) {
      kernel(tasks.keys_and_values(task), query, p + tasks.probabilities_offset(task, r),
             to + tasks.row_offset(task, r));
    });
  });
  return {out, probabilities};
}

// Returns the gradients of q and kv, given that of the output.
std::tuple<Tensor, Tensor> attend_rows_backward(const Tensor& grad_any, const Tensor& q,
                                                const Tensor& q_bias, const Tensor& kv,
                                                const Tensor& probabilities,
                                                const std::optional<Tensor>& given) {
  const std::vector<int64_t> offsets = checked_offsets(q, q_bias, kv, given);
  const Tensor grad = as_contiguous(grad_any);
  const Tensor d_q = torch::stable::new_zeros(q, q.sizes());
  const Tensor d_kv = torch::stable::new_zeros(kv, kv.sizes());
  with_type_of(q, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = SMI_BEST(attend_row_backward<T>);
    const RowTasks<T> tasks(q, q_bias, kv, offsets);
    const T* d_out = grad.const_data_ptr<T>();       // [B, R, H·D]
    const T* p = probabilities.const_data_ptr<T>();  // [B, H, R, N]
    T* d_query = d_q.mutable_data_ptr<T>();          // [B, R, H·D]
    T* d_keys = d_kv.mutable_data_ptr<T>();          // [B, N, 2, H, D]
    tasks.for_each([&](int64_t task, int64_t r, const T* query) {
      const int64_t at = tasks.row_offset(task, r);
      std::vector<T> d_p(tasks.count(task));
      kernel(tasks.keys_and_values(task), query, p + tasks.probabilities_offset(task, r),
             d_out + at, d_p.data(), d_query + at, d_keys + tasks.kv_offset(task));
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
