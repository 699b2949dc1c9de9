// The 16-bit formats: every bit pattern, and rounding against exact arithmetic in double.
#include <doctest/doctest.h>

#include <m2lm/core.hpp>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

namespace {

using namespace m2lm;

/// The value of a pattern with `mantissa` bits and `exponent` bits, from the definition.
double value_of(std::uint32_t bits, int mantissa, int exponent) {
  const std::uint32_t field = (bits >> mantissa) & ((1U << exponent) - 1), fraction = bits & ((1U << mantissa) - 1);
  const int bias = (1 << (exponent - 1)) - 1;
  const double sign = bits >> (mantissa + exponent) ? -1 : 1;
  if (field == (1U << exponent) - 1) return fraction ? std::numeric_limits<double>::quiet_NaN() : sign * HUGE_VAL;
  if (field == 0) return sign * std::ldexp(fraction, 1 - bias - mantissa);
  return sign * std::ldexp(fraction + (1U << mantissa), static_cast<int>(field) - bias - mantissa);
}
double exact(Bf16 x) { return value_of(x.bits, 7, 8); }
double exact(Half x) { return value_of(x.bits, 10, 5); }

Bf16 narrow(float x, Bf16) { return to_bf16(x); }
Half narrow(float x, Half) { return to_half(x); }

TEST_CASE_TEMPLATE("every pattern widens to its value and comes back", T, Bf16, Half) {
  int wrong = 0;
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const T x{static_cast<std::uint16_t>(bits)};
    const float wide = to_float(x);
    const double expected = exact(x);
    if (std::isnan(expected)) {
      wrong += !std::isnan(wide) || !std::isnan(to_float(narrow(wide, T{}))) || std::signbit(to_float(narrow(wide, T{}))) != (bits >> 15 != 0);
    } else {
      wrong += static_cast<double>(wide) != expected || std::signbit(wide) != (bits >> 15 != 0) || narrow(wide, T{}) != x;
    }
  }
  CHECK(wrong == 0);
}

/// Between two neighbours: below the middle goes down, above it up, the middle to the even pattern.
template <class T>
int wrong_roundings(std::uint16_t low_bits, float first_beyond) {
  const T low{low_bits}, high{static_cast<std::uint16_t>(low_bits + 1)};
  const double a = exact(low), b = std::isinf(exact(high)) ? static_cast<double>(first_beyond) : exact(high), middle = (a + b) / 2;
  const float m = static_cast<float>(middle);
  int wrong = 0;
  const auto check = [&](float x, T expected) {
    wrong += narrow(x, T{}) != expected;
    wrong += narrow(-x, T{}).bits != (expected.bits | 0x8000U);
  };
  if (static_cast<double>(m) == middle) {
    check(m, low_bits % 2 == 0 ? low : high);
    check(std::nextafter(m, -HUGE_VALF), low);
    check(std::nextafter(m, HUGE_VALF), high);
  } else {
    ++wrong;  // the middle of two neighbours always fits in f32
  }
  return wrong;
}

TEST_CASE("f32 to bf16 rounds to nearest, ties to even") {
  int wrong = 0;
  for (std::uint32_t bits = 0; bits < 0x7f7f; ++bits) wrong += wrong_roundings<Bf16>(static_cast<std::uint16_t>(bits), 0);
  CHECK(wrong == 0);
  CHECK(to_bf16(std::numeric_limits<float>::max()).bits == 0x7f80);  // above the middle of the last and the next power of two
  CHECK(to_bf16(HUGE_VALF).bits == 0x7f80);
  CHECK(to_bf16(-HUGE_VALF).bits == 0xff80);
  CHECK(to_bf16(-0.0F).bits == 0x8000);
}

TEST_CASE("f32 to f16 rounds to nearest, ties to even, subnormals and overflow included") {
  int wrong = 0;
  for (std::uint32_t bits = 0; bits < 0x7c00; ++bits) wrong += wrong_roundings<Half>(static_cast<std::uint16_t>(bits), 65536.0F);
  CHECK(wrong == 0);
  CHECK(to_half(65504.0F).bits == 0x7bff);
  CHECK(to_half(1e10F).bits == 0x7c00);
  CHECK(to_half(-HUGE_VALF).bits == 0xfc00);
  CHECK(to_half(0x1.0p-25F).bits == 0);  // half of the smallest: to even
  CHECK(to_half(0x1.000002p-25F).bits == 1);
  CHECK(to_half(1e-30F).bits == 0);
  CHECK(to_half(-0.0F).bits == 0x8000);
}

TEST_CASE("a NaN stays a NaN, whatever its payload") {
  for (const std::uint32_t payload : {0x7f800001U, 0x7fc00000U, 0x7f80ffffU, 0xff800001U, 0xffffffffU}) {
    const float nan = std::bit_cast<float>(payload);
    CHECK(std::isnan(to_float(to_bf16(nan))));
    CHECK(std::isnan(to_float(to_half(nan))));
  }
}

TEST_CASE("names and sizes") {
  struct Row {
    DType dtype;
    const char* name;
    std::size_t size;
  };
  for (const Row& row : {Row{DType::f64, "f64", 8}, Row{DType::f32, "f32", 4}, Row{DType::f16, "f16", 2}, Row{DType::bf16, "bf16", 2},
                         Row{DType::i64, "i64", 8}, Row{DType::i32, "i32", 4}, Row{DType::i16, "i16", 2}, Row{DType::i8, "i8", 1},
                         Row{DType::u8, "u8", 1}, Row{DType::boolean, "bool", 1}, Row{DType::q8, "q8", 0}, Row{DType::q4, "q4", 0}, Row{DType::q4_128, "q4_128", 0}, Row{DType::w8a8, "w8a8", 0}, Row{DType::native, "native", 0}, Row{DType::inherit, "inherit", 0}}) {
    CHECK(std::string(dtype_name(row.dtype)) == row.name);
    CHECK(dtype_size(row.dtype) == row.size);
  }
  CHECK(dtype_of<float> == DType::f32);
  CHECK(dtype_of<Bf16> == DType::bf16);
  CHECK(dtype_of<Half> == DType::f16);
  CHECK(dtype_of<std::string> == DType::native);
}

TEST_CASE("Precision: what is not said follows the weights") {
  constexpr Precision p{.weights = DType::bf16, .lm_head = DType::f32};
  static_assert(p.resolve(p.encoders) == DType::bf16);
  static_assert(p.resolve(p.lm_head) == DType::f32);
  static_assert(p == Precision{.weights = DType::bf16, .lm_head = DType::f32});
  static_assert(FixedString("image") == FixedString("image") && !(FixedString("image") == FixedString("audio")));
}

}  // namespace
