// The launchers as Python functions; a pointer is an integer, tensor.data_ptr(), or 0.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "launchers.h"

namespace {

namespace py = pybind11;
using namespace smi_fast;

template <typename T>
struct FromPython {
  using Given = T;
  static T convert(Given given) { return given; }
};
template <typename T>
struct FromPython<T*> {
  using Given = uintptr_t;
  static T* convert(Given given) { return reinterpret_cast<T*>(given); }
};

template <typename... P>
auto python(cudaError_t (*launcher)(P...)) {
  return [launcher](typename FromPython<P>::Given... given) {
    const cudaError_t error = launcher(FromPython<P>::convert(given)...);
    if (error != cudaSuccess) throw std::runtime_error("cudaError_t " + std::to_string(error));
  };
}

}  // namespace

PYBIND11_MODULE(emulated, module) {
  py::enum_<Type>(module, "Type")
      .value("float32", Type::kFloat)
      .value("float16", Type::kHalf)
      .value("bfloat16", Type::kBFloat16);
  py::class_<AttentionShape>(module, "AttentionShape")
      .def(py::init([](int64_t b, int64_t n, int64_t k, int64_t h, int64_t d) {
        return AttentionShape{b, n, k, h, d};
      }));
  py::class_<ImageShape>(module, "ImageShape")
      .def(py::init([](int64_t b, int64_t c, int64_t h, int64_t w, int64_t k, int64_t p) {
        return ImageShape{b, c, h, w, k, p};
      }));
  py::class_<Jitter>(module, "Jitter")
      .def(
          py::init([](uintptr_t shift, uintptr_t flip, int64_t image, int64_t axis, int64_t flips) {
            return Jitter{reinterpret_cast<const int64_t*>(shift),
                          reinterpret_cast<const bool*>(flip), image, axis, flips};
          }));
  py::class_<NormShape>(module, "NormShape").def(py::init([](int64_t b, int64_t c, int64_t n) {
    return NormShape{b, c, n};
  }));
  py::class_<AdamStep>(module, "AdamStep")
      .def(py::init([](uintptr_t step, uintptr_t lr, double beta1, double beta2, double decay) {
        return AdamStep{reinterpret_cast<const int64_t*>(step), reinterpret_cast<const double*>(lr),
                        beta1, beta2, decay};
      }));
  module.attr("VARIATION_SCRATCH") = kVariationBlocks * kVariationSums;
  module.attr("NORM_SPLITS") = kNormSplits;
  module.def("gather_patches_fwd", python(launch_gather_patches_fwd));
  module.def("gather_patches_bwd", python(launch_gather_patches_bwd));
  module.def("gather_sigmoid_patches_fwd", python(launch_gather_sigmoid_patches_fwd));
  module.def("gather_sigmoid_patches_bwd", python(launch_gather_sigmoid_patches_bwd));
  module.def("total_variation_fwd", python(launch_total_variation_fwd));
  module.def("total_variation_bwd", python(launch_total_variation_bwd));
  module.def("batch_norm_matching_fwd", python(launch_batch_norm_matching_fwd));
  module.def("batch_norm_matching_bwd", python(launch_batch_norm_matching_bwd));
  module.def("adam_clamp", python(launch_adam_clamp));
  module.def("gather_attention_fwd", python(launch_gather_attention_fwd));
  module.def("gather_attention_bwd", python(launch_gather_attention_bwd));
  module.def("max_tokens", python(max_tokens));
  module.def("limits_set", [] { return emulated_limits_set; });
  module.def("use_device", [](int device) { emulated_device = device; });
}
