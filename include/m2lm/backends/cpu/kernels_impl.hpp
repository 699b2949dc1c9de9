// The kernels, once per instruction-set level, and the choice between them.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cpu/kernels.hpp>

#include <cstdlib>

#if M2LM_X86_64
#include <immintrin.h>
#endif

// A target region: functions between begin and end may use the instructions of `features`, whatever the file is compiled for.
#if defined(__clang__)
#define M2LM_REGION_PRAGMA(text) _Pragma(#text)
#define M2LM_REGION_BEGIN(features) M2LM_REGION_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define M2LM_REGION_END _Pragma("clang attribute pop")
#else
#define M2LM_REGION_PRAGMA(text) _Pragma(#text)
#define M2LM_REGION_BEGIN(features) _Pragma("GCC push_options") M2LM_REGION_PRAGMA(GCC target(features))
#define M2LM_REGION_END _Pragma("GCC pop_options")
#endif

namespace m2lm::detail::cpu_baseline {
#define M2LM_CPU_NATIVE_BF16 0
#include <m2lm/backends/cpu/kernels/simd_baseline.inc.hpp>
#include <m2lm/backends/cpu/kernels/kernels.inc.hpp>
}  // namespace m2lm::detail::cpu_baseline

#if M2LM_X86_64
M2LM_REGION_BEGIN("avx2,fma,f16c")
namespace m2lm::detail::cpu_avx2 {
#include <m2lm/backends/cpu/kernels/simd_avx2.inc.hpp>
#include <m2lm/backends/cpu/kernels/kernels.inc.hpp>
}  // namespace m2lm::detail::cpu_avx2
M2LM_REGION_END

M2LM_REGION_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
namespace m2lm::detail::cpu_avx512 {
#include <m2lm/backends/cpu/kernels/simd_avx512.inc.hpp>
#include <m2lm/backends/cpu/kernels/simd_avx512_f.inc.hpp>
#include <m2lm/backends/cpu/kernels/kernels.inc.hpp>
}  // namespace m2lm::detail::cpu_avx512
M2LM_REGION_END

#undef M2LM_CPU_NATIVE_BF16
#define M2LM_CPU_NATIVE_BF16 1
M2LM_REGION_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni")
namespace m2lm::detail::cpu_avx512_bf16 {
#include <m2lm/backends/cpu/kernels/simd_avx512.inc.hpp>
#include <m2lm/backends/cpu/kernels/simd_avx512_bf16.inc.hpp>
#include <m2lm/backends/cpu/kernels/kernels.inc.hpp>
}  // namespace m2lm::detail::cpu_avx512_bf16
M2LM_REGION_END
#endif

#undef M2LM_CPU_NATIVE_BF16
#undef M2LM_REGION_BEGIN
#undef M2LM_REGION_END
#undef M2LM_REGION_PRAGMA

namespace m2lm {

M2LM_IMPL IsaLevel detect_isa() {
#if M2LM_X86_64
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return IsaLevel::baseline;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl"))
    return IsaLevel::avx2;
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni")) return IsaLevel::avx512;
  return IsaLevel::avx512_bf16;
#else
  return IsaLevel::baseline;
#endif
}

M2LM_IMPL IsaLevel default_isa() {
  const IsaLevel best = detect_isa();
  const char* cap = std::getenv("M2LM_MAX_ISA");
  if (cap == nullptr || *cap == '\0') return best;
  for (const IsaLevel level : {IsaLevel::baseline, IsaLevel::avx2, IsaLevel::avx512, IsaLevel::avx512_bf16})
    if (isa_name(level) == cap) return level < best ? level : best;
  throw OptionError(concat("m2lm: M2LM_MAX_ISA=", cap, " names no level; the levels are baseline, avx2, avx512, avx512_bf16"));
}

namespace detail {

M2LM_IMPL const KernelTable& kernel_table(IsaLevel level) {
  // Each table is made by code of its own level, so it is made only when that level is asked for.
  switch (level) {
#if M2LM_X86_64
    case IsaLevel::avx512_bf16: {
      static const KernelTable table = cpu_avx512_bf16::make_table(level);
      return table;
    }
    case IsaLevel::avx512: {
      static const KernelTable table = cpu_avx512::make_table(level);
      return table;
    }
    case IsaLevel::avx2: {
      static const KernelTable table = cpu_avx2::make_table(level);
      return table;
    }
#else
    case IsaLevel::avx512_bf16:
    case IsaLevel::avx512:
    case IsaLevel::avx2:
#endif
    case IsaLevel::baseline: break;
  }
  static const KernelTable table = cpu_baseline::make_table(IsaLevel::baseline);
  return table;
}

}  // namespace detail
}  // namespace m2lm
