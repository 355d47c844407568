#include "engine_products.h"

#include "isa.h"

// Weak, because only a torch with MKL or oneDNN defines them. Python checks that before it packs a
// weight.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_cpu__mkl_linear(AtenTensorHandle x, AtenTensorHandle packed, AtenTensorHandle weight,
                           AtenTensorHandle* bias, int64_t packed_rows, AtenTensorHandle* result);
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, const char* attribute,
    const double** scalars, int64_t scalars_count, const char** algorithm,
    AtenTensorHandle* result);

namespace smi_fast {
namespace {

// x · weightᵀ. The weight may be packed, or have any strides.
Tensor onednn_linear(const Tensor& x, const Tensor& weight) {
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise(x.get(), weight.get(), nullptr, "none",
                                                          nullptr, 0, nullptr, &result));
  return Tensor(result);
}

Tensor mkl_linear(const Tensor& x, const Tensor& weight, const Tensor& packed) {
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu__mkl_linear(x.get(), packed.get(), weight.get(), nullptr, x.size(0), &result));
  return Tensor(result);
}

bool is_intel() {
#if SMI_X86_DISPATCH
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

bool products_by_onednn(const Tensor& like) { return by_onednn(like.scalar_type()); }

}  // namespace

bool by_onednn(ScalarType type) {
  static const bool intel = is_intel();
  if (!aoti_torch_cpu__linear_pointwise || isa() < Isa::kAvx512) return false;
  return type == ScalarType::BFloat16 || (type == ScalarType::Float && !intel);
}

Tensor product(const Tensor& x, const Tensor& right) {
  if (!by_onednn(x.scalar_type())) return torch::stable::matmul(x, right);
  return recorded("mkldnn::linear", onednn_linear, x, torch::stable::transpose(right, 0, 1));
}

Tensor packed_product(const Tensor& x, const Tensor& left, const Tensor& packed) {
  if (by_onednn(x.scalar_type())) return recorded("mkldnn::packed", onednn_linear, x, packed);
  return recorded("mkl::packed", mkl_linear, x, left, packed);
}

STABLE_TORCH_LIBRARY_IMPL(smi_fast, CPU, m) {
  m.impl("products_by_onednn", TORCH_BOX(&products_by_onednn));
}

}  // namespace smi_fast
