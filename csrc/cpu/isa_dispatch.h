// Compiles a kernel header once per instruction set. Define these macros first:
// - SMI_KERNEL_HEADER is the name of the header.
// - SMI_KERNEL_NAMESPACE is its namespace inside that of each instruction set. Two headers in one
//   namespace would be dangerous: the linker merges functions of equal name and arguments.
// Include all other headers before this one, because library code must not be compiled for an
// instruction set that the machine may lack.

#include <cstdlib>
#include <cstring>
#include <string_view>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SMI_X86_DISPATCH 1
#else
#define SMI_X86_DISPATCH 0
#endif

namespace smi_fast {

namespace baseline {
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 16;
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
#include "simd.h"
namespace SMI_KERNEL_NAMESPACE {
#include SMI_KERNEL_HEADER
}  // namespace SMI_KERNEL_NAMESPACE
}  // namespace avx512
#pragma GCC pop_options
#endif

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The best instruction set of this machine, or a lesser one that ATEN_CPU_CAPABILITY asks for.
inline Isa best_isa() {
#if SMI_X86_DISPATCH
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view limit = variable ? variable : "";
  if (limit == "default" || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    return Isa::kBaseline;
  }
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 && limit != "avx2" ? Isa::kAvx512 : Isa::kAvx2;
#else
  return Isa::kBaseline;
#endif
}

inline Isa isa() {
  static const Isa best = best_isa();
  return best;
}

}  // namespace smi_fast

// The address of a kernel compiled for this machine. The argument may contain commas.
#if SMI_X86_DISPATCH
#define SMI_BEST(...)                                                                         \
  (::smi_fast::isa() == ::smi_fast::Isa::kAvx512 ? &avx512::SMI_KERNEL_NAMESPACE::__VA_ARGS__ \
   : ::smi_fast::isa() == ::smi_fast::Isa::kAvx2 ? &avx2::SMI_KERNEL_NAMESPACE::__VA_ARGS__   \
                                                 : &baseline::SMI_KERNEL_NAMESPACE::__VA_ARGS__)
#else
#define SMI_BEST(...) (&baseline::SMI_KERNEL_NAMESPACE::__VA_ARGS__)
#endif
