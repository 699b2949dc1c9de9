// The instruction-set levels of the CPU backend, and which one this machine has.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/core/error.hpp>

#include <cstdint>
#include <string_view>

namespace m2lm::inline M2LM_ABI {

/// Levels in ascending order; a machine that has one has those below. `baseline` is what the compiler targets by default.
enum class IsaLevel : std::uint8_t { baseline, avx2, avx512, avx512_bf16, amx };

/// Its enumerator, as M2LM_MAX_ISA names it.
constexpr std::string_view isa_name(IsaLevel level) {
  switch (level) {
    case IsaLevel::baseline: return "baseline";
    case IsaLevel::avx2: return "avx2";
    case IsaLevel::avx512: return "avx512";
    case IsaLevel::avx512_bf16: return "avx512_bf16";
    case IsaLevel::amx: return "amx";
  }
  return "?";
}

/// The highest level that cpuid and the operating system allow: avx2 = AVX2 + FMA + F16C; avx512 = F, BW, DQ, VL;
/// avx512_bf16 = avx512 + BF16 + VNNI; amx = avx512_bf16 + AMX tiles of bf16 and int8, where Linux lets the process use them: the first call
/// asks for that, and a refusal (an old kernel, a container's filter, valgrind) means the level below.
IsaLevel detect_isa();

/// The level that a new backend uses: detect_isa(), capped by the environment variable M2LM_MAX_ISA if that is set. Below amx the system is
/// not asked for its tiles.
/// throws OptionError if the variable names no level.
IsaLevel default_isa();

}  // namespace m2lm
