// The kernels, once per instruction-set level, and the choice between them.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cpu/kernels.hpp>
#include <m2lm/core/threads.hpp>

#include <cstdlib>

#if M2LM_X86_64
#include <immintrin.h>
#endif

namespace m2lm::detail::cpu_baseline {
#define M2LM_CPU_NATIVE_BF16 0
#include <m2lm/backends/cpu/kernels/simd_baseline.inc.hpp>
#include <m2lm/backends/cpu/kernels/kernels.inc.hpp>
#include <m2lm/backends/cpu/kernels/training.inc.hpp>
}  // namespace m2lm::detail::cpu_baseline

#if M2LM_X86_64
M2LM_REGION_BEGIN("avx2,fma,f16c")
namespace m2lm::detail::cpu_avx2 {
#include <m2lm/backends/cpu/kernels/simd_avx2.inc.hpp>
#include <m2lm/backends/cpu/kernels/kernels.inc.hpp>
#include <m2lm/backends/cpu/kernels/training.inc.hpp>
}  // namespace m2lm::detail::cpu_avx2
M2LM_REGION_END

M2LM_REGION_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
namespace m2lm::detail::cpu_avx512 {
#include <m2lm/backends/cpu/kernels/simd_avx512.inc.hpp>
#include <m2lm/backends/cpu/kernels/kernels.inc.hpp>
#include <m2lm/backends/cpu/kernels/training.inc.hpp>
}  // namespace m2lm::detail::cpu_avx512
M2LM_REGION_END

#undef M2LM_CPU_NATIVE_BF16
#define M2LM_CPU_NATIVE_BF16 1
M2LM_REGION_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni")
namespace m2lm::detail::cpu_avx512_bf16 {
#include <m2lm/backends/cpu/kernels/simd_avx512.inc.hpp>
#include <m2lm/backends/cpu/kernels/simd_avx512_bf16.inc.hpp>
#include <m2lm/backends/cpu/kernels/kernels.inc.hpp>
#include <m2lm/backends/cpu/kernels/training.inc.hpp>
}  // namespace m2lm::detail::cpu_avx512_bf16
M2LM_REGION_END
#endif

#undef M2LM_CPU_NATIVE_BF16

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

M2LM_IMPL bool fast_bf16_dot() {
#if M2LM_X86_64
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd");
#else
  return false;
#endif
}

M2LM_IMPL const KernelTable& kernel_table(IsaLevel level, [[maybe_unused]] bool bf16_dot) {
  // Each table is made by code of its own level, so it is made only when that level is asked for.
  switch (level) {
#if M2LM_X86_64
    case IsaLevel::avx512_bf16: {
      static const KernelTable with_f32_products = cpu_avx512_bf16::make_table(level, false);
      static const KernelTable with_dot = cpu_avx512_bf16::make_table(level, true);
      return bf16_dot ? with_dot : with_f32_products;
    }
    case IsaLevel::avx512: {
      static const KernelTable table = cpu_avx512::make_table(level, false);
      return table;
    }
    case IsaLevel::avx2: {
      static const KernelTable table = cpu_avx2::make_table(level, false);
      return table;
    }
#else
    case IsaLevel::avx512_bf16:
    case IsaLevel::avx512:
    case IsaLevel::avx2:
#endif
    case IsaLevel::baseline: break;
  }
  static const KernelTable table = cpu_baseline::make_table(IsaLevel::baseline, false);
  return table;
}

}  // namespace detail
}  // namespace m2lm
