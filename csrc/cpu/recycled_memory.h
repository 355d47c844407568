// Memory for large results, which is reused once the last tensor over it is gone.

#pragma once

#include "common.h"

namespace smi_fast {

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  return {tensor.sizes().begin(), tensor.sizes().end()};
}

// An uninitialized tensor of these sizes, with the dtype of `like`.
Tensor new_result(const Tensor& like, const std::vector<int64_t>& sizes);

}  // namespace smi_fast
