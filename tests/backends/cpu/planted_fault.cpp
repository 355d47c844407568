// A read just past the end of a tensor, to prove that the sanitized build would report one.

#include "../../../csrc/cpu/common.h"

namespace {

double read_past_end(const torch::stable::Tensor& tensor) {
  return tensor.const_data_ptr<float>()[tensor.numel()];
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(smi_fast_planted, m) {
  m.def("read_past_end(Tensor tensor) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(smi_fast_planted, CPU, m) {
  m.impl("read_past_end", TORCH_BOX(&read_past_end));
}
