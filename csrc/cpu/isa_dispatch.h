// Compiles a kernel header once per instruction set. Define these macros first:
// - SMI_KERNEL_HEADER is the name of the header.
// - SMI_KERNEL_NAMESPACE is its namespace inside that of each instruction set. Two headers in one
//   namespace would be dangerous: the linker merges functions of equal name and arguments.
// - SMI_BFLOAT16_KERNEL_HEADER, if there is one, has further kernels for AVX512-BF16 alone.
// The namespaces say how long their vectors are, how many registers hold one, and whether
// instructions convert between float32 and bfloat16 (kNarrows).
// Include all other headers before this one, because library code must not be compiled for an
// instruction set that the machine may lack.

#include <cstring>

#include "isa.h"

#if SMI_X86_DISPATCH
#include <immintrin.h>
#endif

namespace smi_fast {

namespace baseline {
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 16;
constexpr bool kNarrows = false;
#include "simd.h"
namespace SMI_KERNEL_NAMESPACE {
#include SMI_KERNEL_HEADER
}  // namespace SMI_KERNEL_NAMESPACE
}  // namespace baseline

#if SMI_X86_DISPATCH
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
constexpr bool kNarrows = false;
#include "simd.h"
namespace SMI_KERNEL_NAMESPACE {
#include SMI_KERNEL_HEADER
}  // namespace SMI_KERNEL_NAMESPACE
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
namespace avx512 {
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
constexpr bool kNarrows = false;
#include "simd.h"
namespace SMI_KERNEL_NAMESPACE {
#include SMI_KERNEL_HEADER
}  // namespace SMI_KERNEL_NAMESPACE
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
namespace avx512_bf16 {
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
constexpr bool kNarrows = true;
#include "simd.h"
namespace SMI_KERNEL_NAMESPACE {
#include SMI_KERNEL_HEADER
#ifdef SMI_BFLOAT16_KERNEL_HEADER
#include SMI_BFLOAT16_KERNEL_HEADER
#endif
}  // namespace SMI_KERNEL_NAMESPACE
}  // namespace avx512_bf16
#pragma GCC pop_options
#endif

}  // namespace smi_fast

// The address of a kernel compiled for this machine. The arguments may contain commas.
// SMI_BEST_STORING is for a kernel that stores elements of type S, maybe bfloat16.
#if SMI_X86_DISPATCH
#define SMI_BEST(...)                                                                         \
  (::smi_fast::isa() >= ::smi_fast::Isa::kAvx512 ? &avx512::SMI_KERNEL_NAMESPACE::__VA_ARGS__ \
   : ::smi_fast::isa() == ::smi_fast::Isa::kAvx2 ? &avx2::SMI_KERNEL_NAMESPACE::__VA_ARGS__   \
                                                 : &baseline::SMI_KERNEL_NAMESPACE::__VA_ARGS__)
#define SMI_BEST_STORING(S, ...)                                \
  [] {                                                          \
    if constexpr (std::is_same_v<S, ::smi_fast::BFloat16>) {    \
      if (::smi_fast::isa() == ::smi_fast::Isa::kAvx512Bf16) {  \
        return &avx512_bf16::SMI_KERNEL_NAMESPACE::__VA_ARGS__; \
      }                                                         \
    }                                                           \
    return SMI_BEST(__VA_ARGS__);                               \
  }()
#else
#define SMI_BEST(...) (&baseline::SMI_KERNEL_NAMESPACE::__VA_ARGS__)
#define SMI_BEST_STORING(S, ...) SMI_BEST(__VA_ARGS__)
#endif
