// The kernels, once per instruction-set level, and the choice between them.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cpu/kernels.hpp>
#include <m2lm/core/threads.hpp>

#include <array>
#include <cstdlib>
#include <utility>

#if M2LM_X86_64
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace m2lm::inline M2LM_ABI::detail::cpu_baseline {
#define M2LM_CPU_NATIVE_BF16 0
#include <m2lm/backends/cpu/kernels/simd_baseline.inc.hpp>
#include <m2lm/backends/cpu/kernels/kernels.inc.hpp>
#include <m2lm/backends/cpu/kernels/attention.inc.hpp>
#include <m2lm/backends/cpu/kernels/training.inc.hpp>
}  // namespace m2lm::detail::cpu_baseline
namespace m2lm::inline M2LM_ABI::detail::cpu_baseline::floats {
#include <m2lm/backends/cpu/kernels/bytes_baseline.inc.hpp>
#include <m2lm/backends/cpu/kernels/blocks.inc.hpp>
}  // namespace m2lm::detail::cpu_baseline::floats

#if M2LM_X86_64
M2LM_REGION_BEGIN("avx2,fma,f16c")
namespace m2lm::inline M2LM_ABI::detail::cpu_avx2 {
#include <m2lm/backends/cpu/kernels/simd_avx2.inc.hpp>
#include <m2lm/backends/cpu/kernels/kernels.inc.hpp>
#include <m2lm/backends/cpu/kernels/attention.inc.hpp>
#include <m2lm/backends/cpu/kernels/training.inc.hpp>
}  // namespace m2lm::detail::cpu_avx2
namespace m2lm::inline M2LM_ABI::detail::cpu_avx2::shorts {
#include <m2lm/backends/cpu/kernels/bytes_avx2.inc.hpp>
#include <m2lm/backends/cpu/kernels/dot_of_shorts.inc.hpp>
#include <m2lm/backends/cpu/kernels/blocks.inc.hpp>
}  // namespace m2lm::detail::cpu_avx2::shorts
M2LM_REGION_END

M2LM_REGION_BEGIN("avx2,fma,f16c,avxvnni")
namespace m2lm::inline M2LM_ABI::detail::cpu_avx2::vnni {
#include <m2lm/backends/cpu/kernels/bytes_avx2.inc.hpp>
inline Ints dot_four(Ints sum, Ints w, const std::int8_t* x) {
  std::int32_t four;
  __builtin_memcpy(&four, x, sizeof(four));
  return _mm256_dpbusd_avx_epi32(sum, w, set_ints(four));
}
#include <m2lm/backends/cpu/kernels/dot_vnni.inc.hpp>
#include <m2lm/backends/cpu/kernels/blocks.inc.hpp>
}  // namespace m2lm::detail::cpu_avx2::vnni
M2LM_REGION_END

M2LM_REGION_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
namespace m2lm::inline M2LM_ABI::detail::cpu_avx512 {
#include <m2lm/backends/cpu/kernels/simd_avx512.inc.hpp>
#include <m2lm/backends/cpu/kernels/kernels.inc.hpp>
#include <m2lm/backends/cpu/kernels/attention.inc.hpp>
#include <m2lm/backends/cpu/kernels/training.inc.hpp>
}  // namespace m2lm::detail::cpu_avx512
namespace m2lm::inline M2LM_ABI::detail::cpu_avx512::shorts {
#include <m2lm/backends/cpu/kernels/bytes_avx512.inc.hpp>
#include <m2lm/backends/cpu/kernels/dot_of_shorts.inc.hpp>
#include <m2lm/backends/cpu/kernels/blocks.inc.hpp>
}  // namespace m2lm::detail::cpu_avx512::shorts
M2LM_REGION_END

// Serves level avx512_bf16 too.
M2LM_REGION_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
namespace m2lm::inline M2LM_ABI::detail::cpu_avx512::vnni {
#include <m2lm/backends/cpu/kernels/bytes_avx512.inc.hpp>
inline Ints dot_four(Ints sum, Ints w, const std::int8_t* x) {
  struct [[gnu::may_alias, gnu::packed]] Four {
    std::int32_t bytes;
  };
  // g++ 12 does not fold a broadcast into the operand, and instructions are what a product of many rows runs out of.
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*reinterpret_cast<const Four*>(x)));
  return sum;
}
inline Ints dot_four(Ints sum, Ints w, Ints x) {  // not the intrinsic: with many sums g++ 12 moves what it makes of it, and spills
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  return sum;
}
#include <m2lm/backends/cpu/kernels/dot_vnni.inc.hpp>
#include <m2lm/backends/cpu/kernels/blocks.inc.hpp>
#include <m2lm/backends/cpu/kernels/w8a8_vnni.inc.hpp>
}  // namespace m2lm::detail::cpu_avx512::vnni
M2LM_REGION_END

#undef M2LM_CPU_NATIVE_BF16
#define M2LM_CPU_NATIVE_BF16 1
M2LM_REGION_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni")
namespace m2lm::inline M2LM_ABI::detail::cpu_avx512_bf16 {
#include <m2lm/backends/cpu/kernels/simd_avx512.inc.hpp>
#include <m2lm/backends/cpu/kernels/simd_avx512_bf16.inc.hpp>
#include <m2lm/backends/cpu/kernels/kernels.inc.hpp>
#include <m2lm/backends/cpu/kernels/attention.inc.hpp>
#include <m2lm/backends/cpu/kernels/training.inc.hpp>
}  // namespace m2lm::detail::cpu_avx512_bf16
M2LM_REGION_END

M2LM_REGION_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,amx-tile,amx-bf16,amx-int8")
namespace m2lm::inline M2LM_ABI::detail::cpu_avx512_bf16::amx {
#include <m2lm/backends/cpu/kernels/tiles_amx.inc.hpp>
#include <m2lm/backends/cpu/kernels/gemm_amx.inc.hpp>
#include <m2lm/backends/cpu/kernels/dequantised_amx.inc.hpp>
#include <m2lm/backends/cpu/kernels/blocks_amx.inc.hpp>
#include <m2lm/backends/cpu/kernels/attention_amx.inc.hpp>
}  // namespace m2lm::detail::cpu_avx512_bf16::amx
M2LM_REGION_END
#endif

#undef M2LM_CPU_NATIVE_BF16

namespace m2lm::inline M2LM_ABI {

namespace detail {

/// detect_isa() for all but tiles, which need more than the processor's word.
inline IsaLevel detect_vectors() {
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

/// Asks Linux for the state of AMX's tiles (8 KB per thread), for all threads of the process, once. False where there is none or it is refused.
inline bool request_tiles() {
#if M2LM_X86_64 && defined(__linux__) && defined(SYS_arch_prctl)
  constexpr unsigned amx_bf16 = 1U << 22U, amx_tile = 1U << 24U, amx_int8 = 1U << 25U, all = amx_bf16 | amx_tile | amx_int8;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & all) != all) return false;
  unsigned low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned tile_states = 3U << 17U;  // XTILECFG and XTILEDATA of XCR0
  if ((low & tile_states) != tile_states) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM of Linux 5.16
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

}  // namespace detail

M2LM_IMPL IsaLevel detect_isa() {
  const IsaLevel vectors = detail::detect_vectors();
  if (vectors != IsaLevel::avx512_bf16) return vectors;
  static const bool tiles = detail::request_tiles();
  return tiles ? IsaLevel::amx : vectors;
}

M2LM_IMPL IsaLevel default_isa() {
  const char* cap = std::getenv("M2LM_MAX_ISA");
  if (cap == nullptr || *cap == '\0' || isa_name(IsaLevel::amx) == cap) return detect_isa();
  const IsaLevel best = detail::detect_vectors();
  for (const IsaLevel level : {IsaLevel::baseline, IsaLevel::avx2, IsaLevel::avx512, IsaLevel::avx512_bf16})
    if (isa_name(level) == cap) return level < best ? level : best;
  throw OptionError(concat("m2lm: M2LM_MAX_ISA=", cap, " names no level; the levels are baseline, avx2, avx512, avx512_bf16, amx"));
}

namespace detail {

M2LM_IMPL bool fast_bf16_dot([[maybe_unused]] IsaLevel level) {
#if M2LM_X86_64
  if (level == IsaLevel::amx) return true;
  return level == IsaLevel::avx512_bf16 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd");
#else
  return false;
#endif
}

M2LM_IMPL bool has_int8_dot([[maybe_unused]] IsaLevel level) {
#if M2LM_X86_64
  if (level >= IsaLevel::avx512) return __builtin_cpu_supports("avx512vnni");
  unsigned a = 0, b = 0, c = 0, d = 0;  // AVX-VNNI has no name in clang 14's __builtin_cpu_supports
  return level == IsaLevel::avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1U) != 0;
#else
  return false;
#endif
}

M2LM_IMPL const KernelTable& kernel_table(IsaLevel level, [[maybe_unused]] bool bf16_dot, [[maybe_unused]] bool int8_dot) {
  // Each table is made by code of its own level, so it is made only when that level is asked for.
  switch (level) {
#if M2LM_X86_64
    case IsaLevel::amx:
    case IsaLevel::avx512_bf16: {
      const auto table = [](IsaLevel of, bool bf16, bool int8) {
        KernelTable plain = cpu_avx512_bf16::make_table(of, bf16);
        if (of == IsaLevel::amx && bf16) {
          plain.bf16 = cpu_avx512_bf16::amx::bf16_kernels(plain.bf16);
          plain.bf16.attention = cpu_avx512_bf16::attention_kernels<cpu_avx512_bf16::amx::AmxProducts>();
          plain.prefill_q8 = cpu_avx512_bf16::amx::prefill_kernels<DType::q8>();
          plain.prefill_q4 = cpu_avx512_bf16::amx::prefill_kernels<DType::q4>();
        }
        if (of == IsaLevel::amx && int8) return cpu_avx512_bf16::amx::with_tiles(plain);
        return int8 ? cpu_avx512::vnni::with_byte_tiles(plain) : cpu_avx512::shorts::with_blocks(plain, false);
      };
      const auto all = [&table](IsaLevel of) {
        return std::array{table(of, false, false), table(of, false, true), table(of, true, false), table(of, true, true)};
      };
      static const std::array<KernelTable, 4> vectors = all(IsaLevel::avx512_bf16), tiles = all(IsaLevel::amx);
      return (level == IsaLevel::amx ? tiles : vectors)[(bf16_dot ? 2U : 0U) + (int8_dot ? 1U : 0U)];
    }
    case IsaLevel::avx512: {
      static const KernelTable shorts = cpu_avx512::shorts::with_blocks(cpu_avx512::make_table(level, false), false);
      if (!int8_dot || !has_int8_dot(level)) return shorts;
      static const KernelTable vnni = cpu_avx512::vnni::with_byte_tiles(shorts);
      return vnni;
    }
    case IsaLevel::avx2: {
      static const KernelTable shorts = cpu_avx2::shorts::with_blocks(cpu_avx2::make_table(level, false), false);
      if (!int8_dot || !has_int8_dot(level)) return shorts;
      static const KernelTable vnni = cpu_avx2::vnni::with_blocks(shorts, true);
      return vnni;
    }
#else
    case IsaLevel::amx:
    case IsaLevel::avx512_bf16:
    case IsaLevel::avx512:
    case IsaLevel::avx2:
#endif
    case IsaLevel::baseline: break;
  }
  static const KernelTable table = cpu_baseline::floats::with_blocks(cpu_baseline::make_table(IsaLevel::baseline, false), false);
  return table;
}

}  // namespace detail
}  // namespace m2lm
