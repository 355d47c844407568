// The non-GEMM steps of a block as plain functions. For short sequences the dispatcher costs as
// much as a step, so the engine calls these functions directly.

#pragma once

#include <string>
#include <utility>

#include "common.h"

namespace smi_fast {

// The data of a contiguous tensor of `count` elements.
template <typename T>
T* data_of(const Tensor& tensor, int64_t count) {
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == count, "expected ", count,
                  " contiguous elements, got ", tensor.numel());
  return tensor.mutable_data_ptr<T>();
}

// Defined in engine_steps.cpp, engine_eva_steps.cpp, gather_attention.cpp and
// engine_row_attention.cpp.
// LayerNorm, or RMSNorm where `centred` is false. `added` comes with a bias, a bias maybe alone.
void add_normalize_(Tensor x, const std::optional<Tensor>& added, const std::optional<Tensor>& bias,
                    double eps, Tensor normalized, Tensor rstd, bool centred);
// `copy`, if there is one, gets the sum that `gradient` becomes, in the type of grad.
void normalize_backward_(Tensor gradient, const Tensor& grad, const Tensor& normalized,
                         const Tensor& rstd, const std::optional<Tensor>& copy, bool centred);
// `approximate` is "none", "tanh", or "sigmoid" for quick GELU.
void gelu_(Tensor x, const Tensor& bias, Tensor out, const std::string& approximate);
void multiply_(Tensor x, const Tensor& factors);
void rotate_(Tensor x, const Tensor& bias, const Tensor& rotation, bool half);
void rotate_backward_(Tensor gradient, int64_t parts, const Tensor& rotation, bool half);
void swiglu_(Tensor x, const Tensor& bias, Tensor out);
void swiglu_backward_(const Tensor& grad, const Tensor& factors, Tensor d_x);
// The norm inside of attention or of the MLP, of x [rows, F] plus its bias [F], if there is one:
// normalized [rows, F] and rstd [rows].
std::tuple<Tensor, Tensor> normalize_inner(const Tensor& x, const std::optional<Tensor>& bias,
                                           double eps, bool centred);
// The gradient of x, given that of normalized.
Tensor normalize_inner_backward(const Tensor& grad, const Tensor& normalized, const Tensor& rstd,
                                bool centred);
void attend_(const Tensor& qkv, const Tensor& q_bias, Tensor out,
             const std::optional<Tensor>& offsets);
void attend_backward_(const Tensor& grad, const Tensor& qkv, const Tensor& q_bias, Tensor d_qkv,
                      const std::optional<Tensor>& offsets);
std::tuple<Tensor, Tensor> attend_rows(const Tensor& q, const Tensor& q_bias, const Tensor& kv,
                                       const std::optional<Tensor>& offsets);
std::tuple<Tensor, Tensor> attend_rows_backward(const Tensor& grad, const Tensor& q,
                                                const Tensor& q_bias, const Tensor& kv,
                                                const Tensor& probabilities,
                                                const std::optional<Tensor>& offsets);
// Where the tokens of each image of x [B, N, ...] begin among all B·N, and the last ones end: at
// the given offsets, else N apart.
std::vector<int64_t> offsets_of(const Tensor& x, const std::optional<Tensor>& given);

// Runs a step inside a scope that a profiler shows under this name.
template <typename Step, typename... Arguments>
auto recorded(const char* name, const Step& step, Arguments&&... arguments) {
  struct Scope {
    AtenRecordFunctionHandle handle = nullptr;
    explicit Scope(const char* name) {
      TORCH_ERROR_CODE_CHECK(aoti_record_function_start(name, nullptr, nullptr, 0, &handle));
    }
    ~Scope() { aoti_record_function_end(handle); }
  } const scope(name);
  return step(std::forward<Arguments>(arguments)...);
}

}  // namespace smi_fast
