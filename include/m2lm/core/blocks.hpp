// Values of 8 and of 4 bits that share a scale: blocks of 32 (q8, q4: stored so), groups of 128 (q4_128) and rows (w8a8), which are made here.
// Floor: core. May include: config, core.
#pragma once

#include <m2lm/core/dtype.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace m2lm::inline M2LM_ABI {

/// 32 values of 8 bits: value i is scale · values[i]. The bytes of GGUF's Q8_0.
struct Q8Block {
  static constexpr DType dtype = DType::q8;
  Half scale;
  std::array<std::int8_t, block_values> values{};
  friend constexpr bool operator==(const Q8Block&, const Q8Block&) = default;

  /// The integer of value i, without the scale: -127 to 127. requires 0 <= i < 32.
  constexpr int value(std::int64_t i) const { return values[static_cast<std::size_t>(i)]; }
};

/// 32 values of 4 bits: value i is scale · (q - 8), q in 0 … 15. Byte j of `pairs` has q of value j in its low half and q of value
/// j + 16 in its high half. The bytes of GGUF's Q4_0.
struct Q4Block {
  static constexpr DType dtype = DType::q4;
  Half scale;
  std::array<std::uint8_t, block_values / 2> pairs{};
  friend constexpr bool operator==(const Q4Block&, const Q4Block&) = default;

  /// The integer of value i, without the scale: -8 to 7. requires 0 <= i < 32.
  constexpr int value(std::int64_t i) const {
    const unsigned pair = pairs[static_cast<std::size_t>(i % 16)];
    return static_cast<int>(i < 16 ? pair & 15U : pair >> 4U) - 8;
  }
};

/// 128 values of 4 bits: value i is scale · (q - 8), q in 0 … 15. Bytes 16s … 16s + 15 of `pairs` are those of a Q4Block of values 32s on.
struct Q4Group {
  static constexpr DType dtype = DType::q4_128;
  Half scale;
  std::array<std::uint8_t, group_values / 2> pairs{};

  /// The integer of value i, without the scale: -8 to 7. requires 0 <= i < 128.
  constexpr int value(std::int64_t i) const {
    const unsigned pair = pairs[static_cast<std::size_t>(i / 32 * 16 + i % 16)];
    return static_cast<int>(i % 32 < 16 ? pair & 15U : pair >> 4U) - 8;
  }
};

static_assert(sizeof(Q4Group) == dtype_bytes(DType::q4_128, group_values));
static_assert(sizeof(Q8Block) == dtype_bytes(DType::q8, block_values) && sizeof(Q4Block) == dtype_bytes(DType::q4, block_values));

namespace detail {

// Builtins: every tensor's header reaches this one, and <cmath> and <algorithm> are 20,000 lines.

/// The value of largest magnitude, the first of several; NaN if one of the values is not finite.
inline float extreme_value(const float* x, std::int64_t count = block_values) {
  constexpr std::int64_t lanes = 4;  // independent of each other: no comparison waits for the one before
  float most[lanes] = {}, least[lanes] = {}, nothing[lanes] = {};
  const auto look_at = [&](float v, std::int64_t j) {
    most[j] = v > most[j] ? v : most[j];
    least[j] = v < least[j] ? v : least[j];
    nothing[j] += v - v;  // NaN if v is not finite
  };
  const std::int64_t rest = count % lanes, whole = count - rest;
  for (std::int64_t i = 0; i < whole; i += lanes)
    for (std::int64_t j = 0; j < lanes; ++j) look_at(x[i + j], j);
  for (std::int64_t j = 0; j < rest; ++j) look_at(x[whole + j], j);
  for (std::int64_t j = 1; j < lanes; ++j) {
    most[0] = most[j] > most[0] ? most[j] : most[0];
    least[0] = least[j] < least[0] ? least[j] : least[0];
    nothing[0] += nothing[j];
  }
  if (nothing[0] != 0.0F) return __builtin_nanf("");
  if (most[0] != -least[0] || most[0] == 0.0F) return most[0] >= -least[0] ? most[0] : least[0];
  std::int64_t first = 0;
  while (__builtin_fabsf(x[first]) != most[0]) ++first;
  return x[first];
}

/// To the nearest whole number, halves away from zero, of values of magnitude below 2^31. (roundf is a call where there is no SSE 4.1.)
/// requires `count` products that are in memory: no compiler contracts them into the difference.
template <std::int64_t count>
void round_halves_away(const float (&values)[count], std::int8_t* out) {
  for (std::int64_t i = 0; i < count; ++i) {
    const auto whole = static_cast<std::int32_t>(values[i]);
    const float rest = values[i] - static_cast<float>(whole);
    out[i] = static_cast<std::int8_t>(whole + static_cast<std::int32_t>(rest >= 0.5F) - static_cast<std::int32_t>(rest <= -0.5F));
  }
}

/// 1 / step, or 0 where nothing can be told apart: a step of 0, one so small that its inverse overflows, NaN.
inline float inverse_step(float step) {
  const float inverse = 1.0F / step;
  return __builtin_isfinite(inverse) ? inverse : 0.0F;
}

}  // namespace detail

/// Rounds 32 values to a block: step = max |x| / 127, each value to the nearest multiple, halves away from zero. |error| ≤ step/2 and
/// what rounding the step to f16 makes of it. A block with NaN or infinity becomes all NaN. source: quantize_row_q8_0 of the GGUF
/// format (ggml, MIT), as PyPI's `gguf` computes it.
inline Q8Block quantise_q8(const float* x) {
  const float extreme = detail::extreme_value(x);
  const float step = __builtin_fabsf(extreme) / 127.0F;
  Q8Block block{.scale = to_half(step)};
  if (extreme != extreme) return block;
  const float inverse = detail::inverse_step(step);
  float scaled[block_values];
  for (std::int64_t i = 0; i < block_values; ++i) scaled[i] = x[i] * inverse;
  asm volatile("" : : "r"(scaled) : "memory");
  detail::round_halves_away(scaled, block.values.data());
  return block;
}

/// Rounds 32 values to a block: step = extreme / -8, where `extreme` is the value of largest magnitude with its sign, so that it is met
/// (it becomes -8 steps); the largest of the other sign is 7 steps. A block with NaN or infinity becomes all NaN.
/// source: quantize_row_q4_0 of the GGUF format, as PyPI's `gguf` computes it.
inline Q4Block quantise_q4(const float* x) {
  const float extreme = detail::extreme_value(x);
  const float step = extreme / -8.0F;
  Q4Block block{.scale = to_half(step)};
  if (extreme != extreme) return block;
  const float inverse = detail::inverse_step(step);
  float scaled[block_values];
  for (std::int64_t i = 0; i < block_values; ++i) scaled[i] = x[i] * inverse;
  asm volatile("" : : "r"(scaled) : "memory");  // no compiler contracts the product and the sum below
  std::int32_t q[block_values];
  for (std::int64_t i = 0; i < block_values; ++i) {
    const float shifted = scaled[i] + 8.5F;  // at least 0.5: no value is more than 8 steps
    q[i] = static_cast<std::int32_t>(shifted < 15.0F ? shifted : 15.0F);
  }
  for (std::int64_t j = 0; j < 16; ++j) block.pairs[static_cast<std::size_t>(j)] = static_cast<std::uint8_t>(q[j] | q[j + 16] << 4);
  return block;
}

/// Parts of the extreme value of a group that its step may be: those that leave room for the extreme (7, on the wrong side too), meet it
/// (8), or cut it off, which costs less than a coarse step where it stands alone.
inline constexpr float group_steps[] = {7.0F, 7.5F, 8.0F, 8.5F, 9.0F, 10.0F, 11.0F, 12.0F};

/// Rounds 128 values to a group: for each of group_steps the nearest multiples of -extreme/steps in -8 … 7, and for those the scale of
/// least squared error, Σ x·q / Σ q², in f16; the best of them (on normally distributed values 12 % less squared error than the step of
/// quantise_q4). A group with NaN or infinity becomes all NaN. Sums are of exact products, in double and in a fixed order.
inline Q4Group quantise_q4_128(const float* x) {
  const float extreme = detail::extreme_value(x, group_values);
  // What stays where no step is of use: of values hardly there 0, of those beyond f16 infinity.
  Q4Group best{.scale = to_half(__builtin_fabsf(extreme) < 1.0F ? 0.0F : extreme)};
  if (extreme != extreme) return best;
  double most = 0;
  for (const float steps : group_steps) {
    const float inverse = detail::inverse_step(extreme / -steps);
    float scaled[group_values];
    for (std::int64_t i = 0; i < group_values; ++i) scaled[i] = x[i] * inverse;
    asm volatile("" : : "r"(scaled) : "memory");  // no compiler contracts the product and the sum below
    std::int32_t q[group_values];
    for (std::int64_t i = 0; i < group_values; ++i) {
      const float shifted = scaled[i] + 8.5F;
      const float cut = shifted < 0.0F ? 0.0F : shifted;
      q[i] = static_cast<std::int32_t>(cut < 15.0F ? cut : 15.0F) - 8;
    }
    double products[8] = {};
    std::int32_t squares = 0;
    for (std::int64_t i = 0; i < group_values; i += 8)
      for (std::int64_t j = 0; j < 8; ++j) {
        products[j] += static_cast<double>(x[i + j]) * q[i + j];
        squares += q[i + j] * q[i + j];
      }
    const double product = ((products[0] + products[4]) + (products[2] + products[6])) + ((products[1] + products[5]) + (products[3] + products[7]));
    const Half scale = to_half(static_cast<float>(product / (squares > 0 ? squares : 1)));
    const double s = static_cast<double>(to_float(scale)), gain = s * (2 * product - s * squares);  // Σ x² less the squared error
    if (!(gain > most)) continue;
    most = gain;
    best.scale = scale;
    for (std::int64_t i = 0; i < group_values; i += 32)
      for (std::int64_t j = 0; j < 16; ++j)
        best.pairs[static_cast<std::size_t>(i / 2 + j)] = static_cast<std::uint8_t>((q[i + j] + 8) | (q[i + j + 16] + 8) << 4);
  }
  return best;
}

/// Rounds a row of weights to bytes: scale = max |x| / 127, returned; each value to the nearest multiple, halves away from zero. A row
/// with NaN or infinity has scale NaN.
inline float quantise_w8(const float* x, std::int64_t count, std::int8_t* values) {
  const float extreme = detail::extreme_value(x, count);
  const float step = __builtin_fabsf(extreme) / 127.0F;
  const float inverse = extreme == extreme ? detail::inverse_step(step) : 0.0F;
  for (std::int64_t i = 0; i < count; ++i) values[i] = inverse == 0.0F ? std::int8_t{0} : static_cast<std::int8_t>(__builtin_roundf(x[i] * inverse));
  return step;
}

/// Either, by the type of block.
template <class Block>
Block quantise(const float* x) {
  if constexpr (Block::dtype == DType::q8)
    return quantise_q8(x);
  else if constexpr (Block::dtype == DType::q4_128)
    return quantise_q4_128(x);
  else
    return quantise_q4(x);
}

/// Value i of a block; exact: a product of 11 and at most 8 significant bits.
template <class Block>
float dequantise(const Block& block, std::int64_t i) {
  return to_float(block.scale) * static_cast<float>(block.value(i));
}

/// Block `index` of bytes that may lie on any border (in a mapped file).
template <class Block>
Block load_block(const std::byte* blocks, std::int64_t index) {
  Block block;
  std::memcpy(static_cast<void*>(&block), blocks + static_cast<std::size_t>(index) * sizeof(Block), sizeof(Block));
  return block;
}

/// Values [begin, begin + count) of blocks that lie behind each other, converted to T.
template <class Block, class T>
void dequantise(const std::byte* blocks, std::int64_t begin, std::int64_t count, T* out) {
  const std::int64_t end = begin + count;
  for (std::int64_t at = begin; at < end;) {
    const std::int64_t index = at / block_values;
    const Block block = load_block<Block>(blocks, index);
    const std::int64_t stop = end < (index + 1) * block_values ? end : (index + 1) * block_values;
    for (; at < stop; ++at) *out++ = static_cast<T>(dequantise(block, at - index * block_values));
  }
}

}  // namespace m2lm
