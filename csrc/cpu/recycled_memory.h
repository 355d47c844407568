// Memory of large results, which is given out again once the last tensor over it is gone.

#pragma once

#include "common.h"

namespace smi_fast {

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  return {tensor.sizes().begin(), tensor.sizes().end()};
}

// A tensor [sizes] like another one, its elements undefined.
Tensor new_result(const Tensor& like, const std::vector<int64_t>& sizes);

}  // namespace smi_fast
