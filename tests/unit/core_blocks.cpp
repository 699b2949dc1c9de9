// Blocks of q8 and q4: what the ggml project's own Python makes of values, to the bit; bounds on the error; tensors that hold them.
#include <m2lm/core/blocks.hpp>
#include <m2lm/core/rng.hpp>
#include <m2lm/core/tensor.hpp>
#include <m2lm/io/safetensors.hpp>

#include <doctest/doctest.h>

#include <support.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

namespace {

using namespace m2lm;

template <class Block>
void check_golden(const Safetensors& file, const char* name) {
  const Tensor<float> values = file.tensor("values").to<float>();
  const AnyTensor expected = file.tensor(name);
  REQUIRE(expected.bytes() == static_cast<std::size_t>(values.shape()[0]) * sizeof(Block));
  for (std::int64_t i = 0; i < values.shape()[0]; ++i)
    CHECK_MESSAGE((quantise<Block>(values.data() + i * block_values) == load_block<Block>(expected.data(), i)), name, " block ", i);
}

TEST_CASE("blocks are what the ggml project's own code makes of the values, to the bit") {
  const Safetensors file = Safetensors::open(m2lm_test::golden("blocks.safetensors"));
  check_golden<Q8Block>(file, "Q8_0");
  check_golden<Q4Block>(file, "Q4_0");
}

/// |error| of a value of q8: half a step, and 127 times the error of the step in f16 (2^-11 of it, or 2^-25 where that is subnormal).
/// Of q4: the same with 8 steps, except a value beyond 7.5 steps on the side that ends at 7: there a whole step.
template <class Block>
double bound(float extreme) {
  const double largest = std::abs(static_cast<double>(extreme)), steps = Block::dtype == DType::q8 ? 127 : 8;
  const double step = largest / steps;
  return step * (Block::dtype == DType::q8 ? 0.5 : 1.0) * (1 + 0x1.0p-20) + steps * std::max(step * 0x1.0p-11, 0x1.0p-25);
}

template <class Block>
void check_error(Rng& rng) {
  for (int trial = 0; trial < 2000; ++trial) {
    float x[block_values];
    const double scale = std::ldexp(1.0, static_cast<int>(rng.next() % 34) - 18);
    float extreme = 0;
    for (float& v : x) {
      v = static_cast<float>((rng.uniform() * 2 - 1) * scale);
      if (std::abs(v) > std::abs(extreme)) extreme = v;
    }
    const auto block = quantise<Block>(x);
    for (std::int64_t i = 0; i < block_values; ++i)
      CHECK(std::abs(static_cast<double>(dequantise(block, i)) - static_cast<double>(x[i])) <= bound<Block>(extreme));
    // Values that a block holds make the same block again: their extreme is a whole number of steps.
    if (to_float(block.scale) == 0.0F) continue;
    float held[block_values];
    for (std::int64_t i = 0; i < block_values; ++i) held[i] = dequantise(block, i);
    CHECK((quantise<Block>(held) == block));
  }
}

TEST_CASE("the error of a value is at most what its step allows") {
  Rng rng(801);
  check_error<Q8Block>(rng);
  check_error<Q4Block>(rng);
}

/// Squared error of 128 values.
double squared_error(const Q4Group& group, const float* x) {
  double sum = 0;
  for (std::int64_t i = 0; i < group_values; ++i) {
    const double error = static_cast<double>(dequantise(group, i)) - static_cast<double>(x[i]);
    sum += error * error;
  }
  return sum;
}

TEST_CASE("a group of q4_128 has less error than the step that meets its extreme, and values that it holds make it again") {
  Rng rng(803);
  double searched = 0, plain = 0;
  for (int trial = 0; trial < 500; ++trial) {
    const double scale = std::ldexp(1.0, static_cast<int>(rng.next() % 20) - 12);
    float x[group_values], extreme = 0;
    double variance = 0;
    for (float& v : x) {
      double sum = -6;
      for (int i = 0; i < 12; ++i) sum += rng.uniform();  // about normal
      v = static_cast<float>(sum * scale);
    }
    if (trial % 4 == 0) std::fill(x + 1 + trial / 4 % 127, x + group_values, 0.0F);  // filled up, as the last group of a row
    for (const float v : x) {
      if (std::abs(v) > std::abs(extreme)) extreme = v;
      variance += static_cast<double>(v) * static_cast<double>(v);
    }
    const Q4Group group = quantise_q4_128(x);
    Q4Group met{.scale = to_half(extreme / -8.0F)};
    for (std::int64_t i = 0; i < group_values; ++i) {
      const double steps = static_cast<double>(x[i]) / static_cast<double>(extreme / -8.0F);
      const int q = std::clamp(static_cast<int>(std::lround(steps)), -8, 7) + 8;
      met.pairs[static_cast<std::size_t>(i / 32 * 16 + i % 16)] |= static_cast<std::uint8_t>(i % 32 < 16 ? q : q << 4);
    }
    // The scale's rounding to f16 moves a value by 2^-11 of it at most.
    CHECK(squared_error(group, x) <= squared_error(met, x) + variance * 0x1.0p-21);
    searched += squared_error(group, x) / variance;
    plain += squared_error(met, x) / variance;
    float held[group_values];
    for (std::int64_t i = 0; i < group_values; ++i) held[i] = dequantise(group, i);
    const Q4Group again = quantise_q4_128(held);
    for (std::int64_t i = 0; i < group_values; ++i) CHECK(dequantise(again, i) == held[i]);
  }
  CHECK(searched < 0.9 * plain);
  CHECK(std::sqrt(searched / 500) < 0.1);  // of the values' own size
}

TEST_CASE("a group of q4_128 of zeros, of one value, hardly there, or not finite") {
  float x[group_values] = {};
  for (std::int64_t i = 0; i < group_values; ++i) CHECK(dequantise(quantise_q4_128(x), i) == 0.0F);
  x[77] = -0.375F;
  Q4Group group = quantise_q4_128(x);
  for (std::int64_t i = 0; i < group_values; ++i) CHECK(std::abs(dequantise(group, i) - x[i]) <= 0.375F * 0x1.0p-11F);
  for (float& v : x) v = 1e-44F;
  group = quantise_q4_128(x);
  for (std::int64_t i = 0; i < group_values; ++i) CHECK(std::abs(dequantise(group, i)) <= 8 * 0x1.0p-25F);
  for (float& v : x) v = 1e6F;  // a step that f16 does not have
  group = quantise_q4_128(x);
  for (std::int64_t i = 0; i < group_values; ++i) CHECK(std::isinf(dequantise(group, i)));
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()})
    for (const std::int64_t at : {0, 127}) {
      float y[group_values] = {};
      y[5] = 2;
      y[at] = bad;
      group = quantise_q4_128(y);
      for (std::int64_t i = 0; i < group_values; ++i) CHECK(std::isnan(dequantise(group, i)));
      std::int8_t values[group_values];
      CHECK(std::isnan(quantise_w8(y, group_values, values)));
      for (const std::int8_t v : values) CHECK(v == 0);
    }
}

template <class Block>
void check_not_finite() {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()})
    for (const std::int64_t at : {0, 31}) {
      float x[block_values] = {};
      x[5] = 2;
      x[at] = bad;
      const auto block = quantise<Block>(x);
      for (std::int64_t i = 0; i < block_values; ++i) CHECK(std::isnan(dequantise(block, i)));
    }
}

TEST_CASE("a block with a value that is not finite is not a number as a whole") {
  check_not_finite<Q8Block>();
  check_not_finite<Q4Block>();
}

template <class Block>
void check_tensor() {
  Rng rng(802);
  constexpr std::int64_t rows = 3, columns = 96;
  std::vector<Block> blocks;
  std::vector<float> expected;
  for (std::int64_t b = 0; b < rows * columns / block_values; ++b) {
    float x[block_values];
    for (float& v : x) v = static_cast<float>(rng.uniform() - 0.5);
    blocks.push_back(quantise<Block>(x));
    for (std::int64_t i = 0; i < block_values; ++i) expected.push_back(dequantise(blocks.back(), i));
  }
  // On an odd address, as a mapped file may have it.
  auto bytes = std::make_shared<std::vector<std::byte>>(blocks.size() * sizeof(Block) + 1);
  std::memcpy(bytes->data() + 1, blocks.data(), blocks.size() * sizeof(Block));
  const AnyTensor tensor(Block::dtype, Shape{rows, columns}, bytes->data() + 1, bytes);
  CHECK(tensor.bytes() == blocks.size() * sizeof(Block));
  for (std::int64_t i = 0; i < rows * columns; ++i) CHECK(tensor.at(i) == static_cast<double>(expected[static_cast<std::size_t>(i)]));
  for (const auto& [begin, count] : {std::pair<std::int64_t, std::int64_t>{0, rows * columns}, {31, 2}, {33, 100}, {96, 0}, {287, 1}}) {
    std::vector<float> part(static_cast<std::size_t>(count) + 1, -7.0F);
    tensor.copy_to(part.data(), begin, count);
    for (std::int64_t i = 0; i < count; ++i) CHECK(part[static_cast<std::size_t>(i)] == expected[static_cast<std::size_t>(begin + i)]);
    CHECK(part.back() == -7.0F);
  }
  const AnyTensor row = tensor.rows(1, 2);
  CHECK(row.bytes() == 3 * sizeof(Block));
  CHECK(row.at(0) == static_cast<double>(expected[columns]));
  CHECK(tensor.to<double>().data()[5] == static_cast<double>(expected[5]));
}

TEST_CASE("a tensor of blocks: its bytes, elements, stretches and rows") {
  check_tensor<Q8Block>();
  check_tensor<Q4Block>();
  CHECK(dtype_bytes(DType::q8, 64) == 68);
  CHECK(dtype_bytes(DType::q4, 33) == 36);
  CHECK(dtype_bytes(DType::bf16, 33) == 66);
  CHECK(dtype_bytes(DType::q4_128, 129) == 132);
  CHECK(dtype_bytes(DType::w8a8, 33) == 33);
}

}  // namespace
