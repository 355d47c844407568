// The instruction set of this machine.

#pragma once

#include <cstdlib>
#include <string_view>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SMI_X86_DISPATCH 1
#else
#define SMI_X86_DISPATCH 0
#endif

namespace smi_fast {

enum class Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

// The best instruction set of this machine, or a lesser one that ATEN_CPU_CAPABILITY asks for:
// default, avx2, or avx512, which here leaves out AVX512-BF16.
inline Isa best_isa() {
#if SMI_X86_DISPATCH
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view limit = variable ? variable : "";
  if (limit == "default" || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    return Isa::kBaseline;
  }
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512 || limit == "avx2") return Isa::kAvx2;
  return __builtin_cpu_supports("avx512bf16") && limit != "avx512" ? Isa::kAvx512Bf16
                                                                   : Isa::kAvx512;
#else
  return Isa::kBaseline;
#endif
}

inline Isa isa() {
  static const Isa best = best_isa();
  return best;
}

}  // namespace smi_fast
