// Compiler checks and the project's few macros.
// Floor: config. May include: version.hpp.
#pragma once

#include <m2lm/version.hpp>

#if !defined(__cplusplus) || __cplusplus < 202002L
#error "m2lm needs C++20: compile with -std=c++20 or newer"
#endif

// Non-template definitions live in headers named *_impl.hpp, reached only from m2lm/impl.hpp. They are `inline` in the
// header-only form. A program that links m2lm::compiled sees M2LM_SEPARATE_IMPL: then m2lm.hpp leaves impl.hpp out, and the
// one translation unit that includes impl.hpp holds ordinary definitions.
#if defined(M2LM_SEPARATE_IMPL)
#define M2LM_IMPL
#else
#define M2LM_IMPL inline
#endif

#if defined(__CUDACC__)
#define M2LM_HOST_DEVICE __host__ __device__
#else
#define M2LM_HOST_DEVICE
#endif

#if defined(__x86_64__) || defined(_M_X64)
#define M2LM_X86_64 1
#else
#define M2LM_X86_64 0
#endif

// A model that is compiled once: in a header at global scope, after its alias, M2LM_EXTERN_MODEL(template arguments of Model) keeps the
// files that include it from compiling the model's members. One .cpp that defines M2LM_INSTANTIATE before it holds them; m2lm_instantiate
// generates one.
#if defined(M2LM_INSTANTIATE)
#define M2LM_EXTERN_TEMPLATE template
#else
#define M2LM_EXTERN_TEMPLATE extern template
#endif
#define M2LM_EXTERN_MODEL(...)                               \
  M2LM_EXTERN_TEMPLATE class ::m2lm::Model<__VA_ARGS__>;     \
  M2LM_EXTERN_TEMPLATE class ::m2lm::BasicSession<::m2lm::Model<__VA_ARGS__>>

// A planted fault (see testing/faults.hpp): always false in a normal build.
#if defined(M2LM_PLANT_FAULT)
#define M2LM_FAULT(n) (M2LM_PLANT_FAULT == (n))
#else
#define M2LM_FAULT(n) false
#endif

// Before a loop whose trip count is a small constant: unroll it fully, so that arrays of vectors become registers at -O2 too.
#if defined(__clang__) || defined(__CUDACC__)
#define M2LM_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define M2LM_UNROLL _Pragma("GCC unroll 16")
#else
#define M2LM_UNROLL
#endif

// A target region: functions between begin and end may use the instructions of `features`, whatever the file is compiled for.
#define M2LM_REGION_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define M2LM_REGION_BEGIN(features) M2LM_REGION_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define M2LM_REGION_END _Pragma("clang attribute pop")
#else
#define M2LM_REGION_BEGIN(features) _Pragma("GCC push_options") M2LM_REGION_PRAGMA(GCC target(features))
#define M2LM_REGION_END _Pragma("GCC pop_options")
#endif
