// The non-GEMM steps of a block as plain functions. For short sequences the dispatcher costs as
// much as a step, so the engine calls these functions directly.

#pragma once

#include <utility>

#include "common.h"

namespace smi_fast {

// Defined in engine_steps.cpp, gather_attention.cpp and engine_row_attention.cpp.
void add_normalize_(Tensor x, const std::optional<Tensor>& added, const std::optional<Tensor>& bias,
                    double eps, Tensor normalized, Tensor rstd);
void normalize_backward_(Tensor gradient, const Tensor& grad, const Tensor& normalized,
                         const Tensor& rstd);
void gelu_(Tensor x, const Tensor& bias, Tensor out);
void multiply_(Tensor x, const Tensor& factors);
void attend_(const Tensor& qkv, const Tensor& q_bias, Tensor out);
void attend_backward_(const Tensor& grad, const Tensor& qkv, const Tensor& q_bias, Tensor d_qkv);
std::tuple<Tensor, Tensor> attend_rows(const Tensor& q, const Tensor& q_bias, const Tensor& kv);
std::tuple<Tensor, Tensor> attend_rows_backward(const Tensor& grad, const Tensor& q,
                                                const Tensor& q_bias, const Tensor& kv,
                                                const Tensor& probabilities);

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
