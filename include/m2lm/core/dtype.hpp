// Element types: the run-time enumeration, the 16-bit storage structs and their conversions.
// Floor: core. May include: config, core.
#pragma once

#include <m2lm/core/error.hpp>
#include <m2lm/core/memory.hpp>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace m2lm::inline M2LM_ABI {

/// What a stored element is. `inherit` is a policy's "as the one above me"; `native` is the scalar of a Reference<T> backend.
/// `q8` and `q4` come in blocks of 32 values that share a scale (see core/blocks.hpp). `q4_128` and `w8a8` are forms that weights are
/// packed in, not stored: 4 bits in groups of 128 inputs that share a scale, and 8 bits with one scale per output, where what is
/// multiplied by them is rounded to 8 bits too, with one scale per 128 inputs and per row.
enum class DType : std::uint8_t { inherit, native, f64, f32, f16, bf16, i64, i32, i16, i8, u8, boolean, q8, q4, q4_128, w8a8 };

/// Name as users write it on command lines and as messages print it.
constexpr std::string_view dtype_name(DType dtype) {
  switch (dtype) {
    case DType::inherit: return "inherit";
    case DType::native: return "native";
    case DType::f64: return "f64";
    case DType::f32: return "f32";
    case DType::f16: return "f16";
    case DType::bf16: return "bf16";
    case DType::i64: return "i64";
    case DType::i32: return "i32";
    case DType::i16: return "i16";
    case DType::i8: return "i8";
    case DType::u8: return "u8";
    case DType::boolean: return "bool";
    case DType::q8: return "q8";
    case DType::q4: return "q4";
    case DType::q4_128: return "q4_128";
    case DType::w8a8: return "w8a8";
  }
  return "?";
}

/// Values of a block of q8 or q4.
inline constexpr std::int64_t block_values = 32;
/// Values of a group of q4_128.
inline constexpr std::int64_t group_values = 128;

/// Whether elements come in blocks: then only whole blocks have a size.
constexpr bool is_block_format(DType dtype) { return dtype == DType::q8 || dtype == DType::q4; }

/// Whether weights packed in a format are integers with scales.
constexpr bool is_quantised(DType dtype) { return is_block_format(dtype) || dtype == DType::q4_128 || dtype == DType::w8a8; }

/// What is held beside weights of `format` but not as integers, as keys and values are: bf16 for those that are.
constexpr DType plain_format(DType format, DType plain = DType::bf16) { return is_quantised(format) ? plain : format; }

/// Whether elements stand for real numbers: what weights may be.
constexpr bool is_floating(DType dtype) {
  return dtype == DType::f64 || dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16 || is_block_format(dtype);
}

/// Bytes per stored element; 0 where there are none (inherit, native) and where elements have scales too (q8, q4, q4_128, w8a8: use
/// dtype_bytes).
constexpr std::size_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::f64:
    case DType::i64: return 8;
    case DType::f32:
    case DType::i32: return 4;
    case DType::f16:
    case DType::bf16:
    case DType::i16: return 2;
    case DType::i8:
    case DType::u8:
    case DType::boolean: return 1;
    case DType::q8:
    case DType::q4:
    case DType::q4_128:
    case DType::w8a8:
    case DType::inherit:
    case DType::native: break;
  }
  return 0;
}

/// Bytes of `elements` elements; of q8 and q4, of the blocks that hold them: 34 and 18 for 32 values and their scale; of q4_128, 66 for a
/// group; of w8a8, without the scales of rows.
constexpr std::size_t dtype_bytes(DType dtype, std::int64_t elements) {
  if (dtype == DType::w8a8) return static_cast<std::size_t>(elements);
  if (dtype == DType::q4_128) return static_cast<std::size_t>((elements + group_values - 1) / group_values) * 66;
  if (!is_block_format(dtype)) return static_cast<std::size_t>(elements) * dtype_size(dtype);
  return static_cast<std::size_t>((elements + block_values - 1) / block_values) * (dtype == DType::q8 ? 34 : 18);
}

/// bfloat16 storage: the upper half of an f32.
struct Bf16 {
  std::uint16_t bits = 0;
  friend constexpr bool operator==(Bf16, Bf16) = default;
};

/// IEEE binary16 storage.
struct Half {
  std::uint16_t bits = 0;
  friend constexpr bool operator==(Half, Half) = default;
};

/// Exact.
constexpr float to_float(Bf16 x) { return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }

/// Rounds to nearest, ties to even; a NaN stays a NaN.
constexpr Bf16 to_bf16(float x) {
  const auto u = std::bit_cast<std::uint32_t>(x);
  if ((u & 0x7fffffffU) > 0x7f800000U) return {static_cast<std::uint16_t>((u >> 16) | 0x0040U)};
  return {static_cast<std::uint16_t>((u + 0x7fffU + ((u >> 16) & 1U)) >> 16)};
}

/// Exact.
constexpr float to_float(Half x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000U) << 16, rest = static_cast<std::uint32_t>(x.bits & 0x7fffU) << 13;
  const std::uint32_t special = 0U - static_cast<std::uint32_t>(rest >= 0x0f800000U);  // infinity or NaN: all bits, else none
  // The exponent is 112 too small, which a product with 2^112 mends, of subnormal numbers too.
  const float magnitude = std::bit_cast<float>(rest) * 5.192296858534828e33F;
  return std::bit_cast<float>(sign | (std::bit_cast<std::uint32_t>(magnitude) & ~special) | ((0x70000000U + rest) & special));
}

/// Rounds to nearest, ties to even; overflow gives infinity, a NaN stays a NaN.
constexpr Half to_half(float x) {
  const auto u = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = (u >> 16) & 0x8000U;
  const std::uint32_t magnitude = u & 0x7fffffffU;
  if (magnitude > 0x7f800000U) return {static_cast<std::uint16_t>(sign | 0x7e00U)};
  if (magnitude >= 0x477ff000U) return {static_cast<std::uint16_t>(sign | 0x7c00U)};
  if (magnitude >= 0x38800000U) {  // normal in half
    const std::uint32_t rounded = magnitude + 0xfffU + ((magnitude >> 13) & 1U);
    return {static_cast<std::uint16_t>(sign | ((rounded - 0x38000000U) >> 13))};
  }
  // Subnormal: adding 2^-1 * ulp lets the f32 adder round to a multiple of 2^-24.
  const float shifted = std::bit_cast<float>(magnitude) + 0.5F;
  return {static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(shifted) - 0x3f000000U))};
}

/// For code that takes elements of any type.
constexpr float to_float(float x) { return x; }
/// Rounds to nearest.
constexpr float to_float(double x) { return static_cast<float>(x); }

/// The dtype whose elements are T; `native` for types that are in no file.
template <class T>
inline constexpr DType dtype_of = DType::native;
template <>
inline constexpr DType dtype_of<double> = DType::f64;
template <>
inline constexpr DType dtype_of<float> = DType::f32;
template <>
inline constexpr DType dtype_of<Half> = DType::f16;
template <>
inline constexpr DType dtype_of<Bf16> = DType::bf16;
template <>
inline constexpr DType dtype_of<std::int64_t> = DType::i64;
template <>
inline constexpr DType dtype_of<std::int32_t> = DType::i32;
template <>
inline constexpr DType dtype_of<std::int16_t> = DType::i16;
template <>
inline constexpr DType dtype_of<std::int8_t> = DType::i8;
template <>
inline constexpr DType dtype_of<std::uint8_t> = DType::u8;
template <>
inline constexpr DType dtype_of<bool> = DType::boolean;
template <class T>
inline constexpr DType dtype_of<OnDevice<T>> = dtype_of<T>;

}  // namespace m2lm
