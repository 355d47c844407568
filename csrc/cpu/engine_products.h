// The matrix products of the engine, each by the library that is fastest for it on this machine.

#pragma once

#include "engine_steps_api.h"

namespace smi_fast {

// Whether products of a type are oneDNN's, and weights are packed for it:
// - bfloat16 with AVX-512;
// - float32 with AVX-512 on processors of others than Intel, where MKL uses only half of a vector.
// Other products are those of torch, and of MKL where weights are packed.
bool by_onednn(ScalarType type);

// x [rows, in] · right [in, out].
Tensor product(const Tensor& x, const Tensor& right);

// The same with a copy of rightᵀ = left that is packed for this number of rows.
Tensor packed_product(const Tensor& x, const Tensor& left, const Tensor& packed);

}  // namespace smi_fast
