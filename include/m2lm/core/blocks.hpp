// Blocks of 32 values with one scale, in 8 and in 4 bits: how q8 and q4 are stored, made and read.
// Floor: core. May include: config, core.
#pragma once

#include <m2lm/core/dtype.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace m2lm {

/// 32 values of 8 bits: value i is scale · values[i]. The bytes of GGUF's Q8_0.
struct Q8Block {
  static constexpr DType dtype = DType::q8;
  Half scale;
  std::array<std::int8_t, block_values> values{};
  friend constexpr bool operator==(const Q8Block&, const Q8Block&) = default;

  constexpr int value(std::int64_t i) const { return values[static_cast<std::size_t>(i)]; }
};

/// 32 values of 4 bits: value i is scale · (q - 8), q in 0 … 15. Byte j of `pairs` has q of value j in its low half and q of value
/// j + 16 in its high half. The bytes of GGUF's Q4_0.
struct Q4Block {
  static constexpr DType dtype = DType::q4;
  Half scale;
  std::array<std::uint8_t, block_values / 2> pairs{};
  friend constexpr bool operator==(const Q4Block&, const Q4Block&) = default;

  constexpr int value(std::int64_t i) const {
    const unsigned pair = pairs[static_cast<std::size_t>(i % 16)];
    return static_cast<int>(i < 16 ? pair & 15U : pair >> 4U) - 8;
  }
};

static_assert(sizeof(Q8Block) == dtype_bytes(DType::q8, block_values) && sizeof(Q4Block) == dtype_bytes(DType::q4, block_values));

namespace detail {

// Builtins: every tensor's header reaches this one, and <cmath> and <algorithm> are 20,000 lines.

/// The value of largest magnitude, the first of several; NaN if one of the values is not finite.
inline float extreme_value(const float* x) {
  float extreme = 0;
  bool finite = true;
  for (std::int64_t i = 0; i < block_values; ++i) {
    finite = finite && __builtin_isfinite(x[i]);
    if (__builtin_fabsf(x[i]) > __builtin_fabsf(extreme)) extreme = x[i];
  }
  return finite ? extreme : __builtin_nanf("");
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
  for (std::size_t i = 0; i < block_values; ++i) block.values[i] = static_cast<std::int8_t>(__builtin_roundf(x[i] * inverse));
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
  const auto inverse = static_cast<double>(detail::inverse_step(step));
  const auto quantised = [&](std::int64_t i) {
    // f32 arithmetic that no compiler contracts to an fma: product and sum are rounded each.
    const auto product = static_cast<double>(static_cast<float>(static_cast<double>(x[i]) * inverse));
    const int q = static_cast<int>(static_cast<float>(product + 8.5));
    return static_cast<unsigned>(q < 15 ? q : 15);
  };
  for (std::int64_t j = 0; j < 16; ++j) block.pairs[static_cast<std::size_t>(j)] = static_cast<std::uint8_t>(quantised(j) | quantised(j + 16) << 4U);
  return block;
}

/// Either, by the type of block.
template <class Block>
Block quantise(const float* x) {
  if constexpr (Block::dtype == DType::q8)
    return quantise_q8(x);
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
