// Shared by the tests of ops: random tensors with fixed seeds, the levels of this machine, and the comparison with a bound.
#pragma once

#include <doctest/doctest.h>

#include <m2lm/core.hpp>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace m2lm_test {

using namespace m2lm;

/// Unit roundoff of f32 and bf16: half a unit in the last of 24 and of 8 significant bits.
inline constexpr double u32 = 0x1.0p-24;
inline constexpr double u16 = 0x1.0p-8;

/// The levels that this machine (and M2LM_MAX_ISA, if it is set) allows.
inline std::vector<IsaLevel> levels() {
  std::vector<IsaLevel> out;
  for (const IsaLevel level : {IsaLevel::baseline, IsaLevel::avx2, IsaLevel::avx512, IsaLevel::avx512_bf16, IsaLevel::amx})
    if (level <= default_isa()) out.push_back(level);
  return out;
}

/// Formats of keys and values; and those of weights.
inline constexpr std::array<DType, 2> formats{DType::f32, DType::bf16};
inline constexpr std::array<DType, 6> weight_formats{DType::f32, DType::bf16, DType::q8, DType::q4, DType::q4_128, DType::w8a8};
inline constexpr std::array<DType, 4> quantised_formats{DType::q8, DType::q4, DType::q4_128, DType::w8a8};

/// Inputs of a row that share a scale.
inline std::int64_t scale_inputs(DType format, std::int64_t columns) {
  const std::int64_t inputs = detail::quantised_format(format).scale_inputs;
  return inputs == 0 ? std::max<std::int64_t>(columns, 1) : inputs;
}

/// A level, which of its ways to multiply bf16 (they differ at avx512_bf16 and amx) and bytes (where the machine has VNNI), and in which phase.
struct Variant {
  IsaLevel level = IsaLevel::baseline;
  bool bf16_dot = false;
  bool int8_dot = true;
  Phase phase = Phase::decode;
  CpuOptions options(int threads) const { return {.threads = threads, .max_isa = level, .bf16_dot = bf16_dot, .int8_dot = int8_dot}; }
};

/// Every set of kernels that this machine can run, for weights of `format`.
inline std::vector<Variant> variants(DType format) {
  std::vector<Variant> out;
  for (const IsaLevel level : levels()) {
    out.push_back({level, false, !is_quantised(format)});
    if (is_quantised(format) && detail::has_int8_dot(level)) out.push_back({level, false, true});
  }
  for (const IsaLevel level : levels())
    if (format == DType::bf16 && level >= IsaLevel::avx512_bf16) out.push_back({level, true});
  if ((format == DType::q8 || format == DType::q4) && default_isa() == IsaLevel::amx) out.push_back({IsaLevel::amx, true, true, Phase::prefill});
  return out;
}

/// True where the kernels round the activations of a product to bf16.
inline bool rounds_activations(const Cpu& cpu, DType format, Phase phase = Phase::decode) {
  return cpu.kernels().format(format, phase)->bf16_activations;
}

inline float rounded(float x, DType format) { return format == DType::bf16 ? to_float(to_bf16(x)) : x; }

/// A generator of test data.
class Random {
  Rng rng_;

 public:
  explicit Random(std::uint64_t seed) : rng_(seed) {}

  /// Uniform in [low, high].
  std::int64_t integer(std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(rng_.next() % static_cast<std::uint64_t>(high - low + 1));
  }
  bool coin() { return integer(0, 1) == 1; }
  /// About normal: mean 0, variance 1, |x| < 3.5.
  float value() {
    double sum = -2;
    for (int i = 0; i < 4; ++i) sum += rng_.uniform();
    return static_cast<float>(sum * 1.7320508);
  }
  /// A size at which loops over vectors, tiles, panels and blocks begin or end, or any other.
  std::int64_t size(std::int64_t largest) {
    static constexpr std::int64_t edges[] = {1,  2,  3,  4,  5,  7,  8,  9,  11, 12, 13, 15, 16,  17,  23,  24,  25,
                                             31, 32, 33, 37, 47, 48, 49, 61, 63, 64, 65, 96, 127, 128, 129, 191, 193};
    for (;;) {
      const std::int64_t n = integer(0, 3) == 0 ? integer(1, largest) : edges[static_cast<std::size_t>(integer(0, std::size(edges) - 1))];
      if (n <= largest) return n;
    }
  }
};

/// The values of a row, rounded to what shares a scale (the last block or group is filled up with zeros).
inline std::vector<float> rounded_to_blocks(std::span<const float> row, DType format) {
  std::vector<float> out(row.size());
  if (format == DType::w8a8) {
    std::vector<std::int8_t> values(row.size());
    const float scale = quantise_w8(row.data(), static_cast<std::int64_t>(row.size()), values.data());
    for (std::size_t i = 0; i < row.size(); ++i) out[i] = scale * static_cast<float>(values[i]);
    return out;
  }
  const auto block_size = static_cast<std::size_t>(scale_inputs(format, 0));
  for (std::size_t first = 0; first < row.size(); first += block_size) {
    const std::size_t count = std::min(row.size() - first, block_size);
    float block[group_values] = {};
    std::copy_n(row.data() + first, count, block);
    for (std::size_t i = 0; i < count; ++i) {
      const auto at = static_cast<std::int64_t>(i);
      out[first + i] = format == DType::q8   ? dequantise(quantise_q8(block), at)
                       : format == DType::q4 ? dequantise(quantise_q4(block), at)
                                             : dequantise(quantise_q4_128(block), at);
    }
  }
  return out;
}

/// Values that `format` holds exactly.
template <class T>
Tensor<T> random_tensor(Random& random, Shape shape, DType format = DType::f32, double scale = 1) {
  Tensor<T> out(shape);
  for (T& x : out.span()) x = static_cast<T>(rounded(random.value() * static_cast<float>(scale), format));
  if (is_quantised(format)) {
    const std::int64_t columns = ops::columns_of(shape);
    std::vector<float> row(static_cast<std::size_t>(columns));
    for (std::int64_t i = 0; i < (columns > 0 ? shape[0] : 0); ++i) {
      for (std::int64_t c = 0; c < columns; ++c) row[static_cast<std::size_t>(c)] = static_cast<float>(out.data()[i * columns + c]);
      const std::vector<float> held = rounded_to_blocks(row, format);
      for (std::int64_t c = 0; c < columns; ++c) out.data()[i * columns + c] = static_cast<T>(held[static_cast<std::size_t>(c)]);
    }
  }
  return out;
}

/// A matrix of values that blocks hold, as a tensor of blocks. requires columns in whole blocks.
inline AnyTensor in_blocks(const Tensor<float>& values, DType format) {
  auto bytes = std::make_shared<std::vector<std::byte>>(dtype_bytes(format, values.elements()) + 1);  // never null
  for (std::int64_t b = 0; b < values.elements() / block_values; ++b) {
    const float* from = values.data() + b * block_values;
    if (format == DType::q8) {
      const Q8Block block = quantise_q8(from);
      std::memcpy(bytes->data() + static_cast<std::size_t>(b) * sizeof(block), &block, sizeof(block));
    } else {
      const Q4Block block = quantise_q4(from);
      std::memcpy(bytes->data() + static_cast<std::size_t>(b) * sizeof(block), &block, sizeof(block));
    }
  }
  return AnyTensor(format, values.shape(), bytes->data(), bytes);
}

template <class To, class From>
Tensor<To> converted(const Tensor<From>& from) {
  Tensor<To> out(from.shape());
  for (std::int64_t i = 0; i < from.elements(); ++i) out.data()[i] = static_cast<To>(from.data()[i]);
  return out;
}

template <class T>
Matrix<const T> matrix(const Tensor<T>& t) {
  return t.template view<2>();
}

/// A matrix inside a wider buffer; the columns that belong to nobody hold `gap`.
template <class T>
class Strided {
  Tensor<T> buffer_;
  std::int64_t cols_;
  T gap_;

 public:
  Strided(std::int64_t rows, std::int64_t cols, std::int64_t extra, T gap) : buffer_(Shape{rows, cols + extra}), cols_(cols), gap_(gap) {
    for (T& x : buffer_.span()) x = gap;
  }
  Strided(const Tensor<T>& from, std::int64_t extra, T gap) : Strided(from.shape()[0], from.shape()[1], extra, gap) {
    for (std::int64_t i = 0; i < from.shape()[0]; ++i)
      for (std::int64_t j = 0; j < cols_; ++j) view()(i, j) = from.data()[i * cols_ + j];
  }
  Matrix<T> view() { return buffer_.template view<2>().columns(0, cols_); }
  /// Whether nothing was written outside the matrix.
  bool gaps_untouched() const {
    const std::int64_t stride = buffer_.shape()[1];
    for (std::int64_t i = 0; i < buffer_.shape()[0]; ++i)
      for (std::int64_t j = cols_; j < stride; ++j)
        if (std::memcmp(&buffer_.data()[i * stride + j], &gap_, sizeof(T)) != 0) return false;
    return true;
  }
};

/// The largest |got - expected| / bound over all elements (a NaN counts as infinite); passed when it is at most 1.
class Worst {
  double ratio_ = 0;
  std::string where_;

 public:
  void add(double got, double expected, double bound, std::int64_t i, std::int64_t j) {
    const double error = std::abs(got - expected);
    const double ratio = error == 0 ? 0 : !(error <= std::numeric_limits<double>::max()) ? HUGE_VAL : error / bound;
    if (ratio <= ratio_) return;
    ratio_ = ratio;
    char text[160];
    std::snprintf(text, sizeof(text), "(%lld, %lld): %.9g instead of %.9g, bound %.3g", static_cast<long long>(i), static_cast<long long>(j), got,
                  expected, bound);
    where_ = text;
  }
  bool passed() const { return ratio_ <= 1; }
  double ratio() const { return ratio_; }
  const std::string& where() const { return where_; }
};

template <class T>
bool same_bits(Matrix<const T> a, Matrix<const T> b) {
  if (a.shape() != b.shape()) return false;
  for (std::int64_t i = 0; i < a.extent(0); ++i)
    if (std::memcmp(a.row(i), b.row(i), static_cast<std::size_t>(a.extent(1)) * sizeof(T)) != 0) return false;
  return true;
}

/// A backend with its context and arena.
template <class B>
struct Runner {
  B backend;
  Arena arena;
  Context<B> ctx{backend, arena};
  explicit Runner(B b = B{}) : backend(std::move(b)) {}
  Runner(const Runner&) = delete;
  Runner& operator=(const Runner&) = delete;
};

inline std::string label(const Variant& variant, DType format) {
  return concat(isa_name(variant.level), variant.bf16_dot || (variant.int8_dot && is_quantised(format)) ? " dot " : " ", dtype_name(format),
                variant.phase == Phase::prefill ? " prefill" : "");
}

/// Keys and values of one layer with their memory. Never moved: the views point into it.
template <class B>
struct Cache {
  std::vector<std::byte> keys, values;
  KeyValues kv;
  Cache(Context<B>& ctx, DType format, std::int64_t kv_heads, std::int64_t head_dim, std::int64_t capacity) {
    const KeyValuesPlan plan = ops::plan_key_values(ctx, format, kv_heads, head_dim, capacity);
    keys.assign(plan.bytes, std::byte{0xff});  // NaN: nothing may be read that was not stored
    values.assign(plan.bytes, std::byte{0xff});
    kv = {format, kv_heads, head_dim, plan.capacity, keys.data(), values.data()};
  }
  Cache(const Cache&) = delete;
  Cache& operator=(const Cache&) = delete;
};

}  // namespace m2lm_test
