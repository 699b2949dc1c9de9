// pack and linear on a device, against sums in f64.
//
// The bound on an output, with u = 2^-24 (unit roundoff of f32), e that of E, k inputs. The operands are the same numbers in both
// computations: x, bias and residual are of E, the weights are those of the format (of q8 and q4, scale · integer).
//   z = Σ x·w + b      an addition and a product each round once, and an addition inside an mma truncates, which counts twice; the sum of
//                      a block is multiplied by its scale: |δz| ≤ (3k + 16)·u·S, S = Σ |x|·|w| + |b|     (Higham, γ_n)
//                      Where a product of many rows is stored before its epilogue, + e·|z|, or before its bias, + e·|z - b|.
//   f(z)               |δf| ≤ L·|δz| + 16·u·|z|: L = 1.2 bounds |f'| of every activation; 16 roundings: exp, erf and tanh to 2 ulp
//   f(z)·z'            |δ| ≤ |f|·|δz'| + |z'|·|δf| + |δf|·|δz'| + u·|f·z'|
//   … + residual       + u·|y|, then + (that of the type stored)·|y|
// and what underflows: 2^-126·k, of f16 2^-25.
#include "device_support.hpp"

#include <m2lm/backends/cuda/kernels/linear.cuh>
#include <m2lm/backends/reference/reference.hpp>

#include <doctest/doctest.h>

#include <array>
#include <memory>
#include <string>
#include <vector>

namespace {

using namespace m2lm_test;

constexpr double u = 0x1.0p-24;
constexpr std::array<Activation, 6> activations{Activation::none, Activation::relu,      Activation::silu,
                                                Activation::gelu, Activation::gelu_tanh, Activation::quick_gelu};

struct Problem {
  std::int64_t m = 1, n = 1, k = 1;  // n outputs
  bool gated = false, bias = false, residual = false, alias = false;
  std::int64_t extra = 0;   // elements between the rows of x, y and the residual
  std::int64_t offset = 0;  // elements between them and an aligned address
  Activation activation = Activation::none;
  std::int64_t first_rows = 0;  // rows of the first of two sources (not gated)

  std::int64_t rows() const { return gated ? 2 * n : n; }
  std::string string() const {
    return concat("m=", m, " n=", n, " k=", k, " gated=", gated, " bias=", bias, " residual=", residual, " alias=", alias, " extra=", extra,
                  " offset=", offset, " activation=", static_cast<int>(activation), " first=", first_rows);
  }
};

/// The values that a matrix [rows, k] has once it is in `format`.
std::vector<double> as_stored(const std::vector<float>& w, std::int64_t rows, std::int64_t k, DType format) {
  std::vector<double> out;
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t begin = 0; begin < k; begin += block_values) {
      std::array<float, block_values> block{};
      const std::int64_t count = std::min(block_values, k - begin);
      for (std::int64_t i = 0; i < count; ++i) block[static_cast<std::size_t>(i)] = w[static_cast<std::size_t>(r * k + begin + i)];
      for (std::int64_t i = 0; i < count; ++i) {
        const float x = block[static_cast<std::size_t>(i)];
        out.push_back(static_cast<double>(format == DType::q8     ? dequantise(quantise_q8(block.data()), i)
                                          : format == DType::q4   ? dequantise(quantise_q4(block.data()), i)
                                          : format == DType::f16  ? to_float(to_half(x))
                                          : format == DType::bf16 ? to_float(to_bf16(x))
                                                                  : x));
      }
    }
  return out;
}

AnyTensor tensor_of(const float* values, std::int64_t rows, std::int64_t cols) {
  Tensor<float> t(Shape{rows, cols});
  std::copy_n(values, rows * cols, t.data());
  return AnyTensor(std::move(t));
}

template <class E, class Out>
struct Data {
  std::vector<E> x, bias;
  std::vector<Out> residual;
  std::vector<float> w;

  Data(const Problem& p, Random& random)
      : x(random.elements<E>(p.m * p.k)),
        bias(random.elements<E>(p.rows())),
        residual(random.elements<Out>(p.m * p.n)),
        w(random.elements<float>(p.rows() * p.k, 1 / std::sqrt(static_cast<float>(p.k)))) {}

  std::vector<AnyTensor> sources(const Problem& p) const {
    const std::int64_t cut = p.gated ? p.n : p.first_rows;
    std::vector<AnyTensor> out;
    if (cut > 0) out.push_back(tensor_of(w.data(), cut, p.k));
    if (cut < p.rows()) out.push_back(tensor_of(w.data() + cut * p.k, p.rows() - cut, p.k));
    return out;
  }
};

/// What y should be, element by element, and how far it may be from that. `stored`: the sums are rounded to E before their epilogue.
template <class E, class Out>
Worst compare(const Problem& p, const Data<E, Out>& data, const std::vector<double>& w, const std::vector<Out>& y, bool stored) {
  const std::vector<double> x = doubles(data.x), bias = doubles(data.bias), residual = doubles(data.residual);
  Worst worst;
  for (std::int64_t i = 0; i < p.m; ++i)
    for (std::int64_t j = 0; j < p.n; ++j) {
      const auto product = [&](std::int64_t row) {
        const double b = p.bias ? bias[static_cast<std::size_t>(row)] : 0;
        double z = b, s = std::abs(b);
        for (std::int64_t c = 0; c < p.k; ++c) {
          const double term = x[static_cast<std::size_t>(i * p.k + c)] * w[static_cast<std::size_t>(row * p.k + c)];
          z += term;
          s += std::abs(term);
        }
        const double k = static_cast<double>(p.k);
        return std::pair{z,
                         (3 * k + 16) * u * s + k * 0x1.0p-126 + (stored ? roundoff<E> * std::max(std::abs(z), std::abs(z - b)) + underflow<E> : 0)};
      };
      const auto [z, dz] = product(j);
      double f = m2lm::detail::apply_activation(p.activation, z);
      double bound = p.activation == Activation::none ? dz : 1.2 * dz + 16 * u * std::abs(z);
      if (p.gated) {
        const auto [z2, dz2] = product(p.n + j);
        bound = std::abs(f) * dz2 + std::abs(z2) * bound + bound * dz2 + u * std::abs(f * z2);
        f *= z2;
      }
      const auto at = static_cast<std::size_t>(i * p.n + j);
      if (p.residual) f += residual[at];
      worst.add(static_cast<double>(to_float(y[at])), f, bound * 1.01 + (u + roundoff<Out>)*std::abs(f) + underflow<Out>,
                static_cast<std::int64_t>(at));
    }
  return worst;
}

/// linear on the device.
template <class E, class Out>
std::vector<Out> run(cuda::Device& device, const PackedMatrix& w, const Problem& p, const Data<E, Out>& data) {
  // Behind the columns of x are NaN: what is read there shows, though the weights there are zero.
  const std::int64_t ldx = p.k + p.extra;
  std::vector<E> rows(static_cast<std::size_t>(p.m * ldx), element<E>(std::numeric_limits<float>::quiet_NaN()));
  for (std::int64_t i = 0; i < p.m * p.k; ++i) rows[static_cast<std::size_t>(i / p.k * ldx + i % p.k)] = data.x[static_cast<std::size_t>(i)];
  const DeviceArray<E> x(device, rows, p.offset);
  DeviceMatrix<Out> residual(device, p.m, p.n, data.residual, p.extra + 8, p.offset);
  DeviceMatrix<Out> y(device, p.m, p.n, p.extra, p.offset);
  DeviceArray<E> bias(device, data.bias, p.offset);
  const std::size_t scratch_bytes = cuda::linear_scratch<E>(p.m, w);
  void* scratch = scratch_bytes == 0 ? nullptr : device.allocate(scratch_bytes);
  const Matrix<Out> out = p.residual && p.alias ? residual.view() : y.view();
  cuda::linear<E, Out>(device, Matrix<const E>(x.data(), {p.m, p.k}, {ldx, 1}), w, p.bias ? bias.data() : nullptr, p.activation,
                       p.residual ? residual.const_view() : Matrix<const Out>{}, out, scratch);
  device.release(scratch);
  return p.residual && p.alias ? residual.read() : y.read();
}

/// A device with `multiprocessors`, which is what block sizes are chosen by. A real one has as many as it has.
std::shared_ptr<cuda::Device> device_with([[maybe_unused]] int multiprocessors) {
#if !defined(__CUDACC__)
  cuda::emulation::Machine machine;
  machine.multiprocessors = multiprocessors;
  const cuda::emulation::MachineScope scope(machine);
#endif
  return std::make_shared<cuda::Device>(0);
}

template <class E>
std::vector<DType> formats_of() {
  return {dtype_of<E>, DType::q8, DType::q4};
}

template <class E, class Out>
void check(const std::shared_ptr<cuda::Device>& device, const Problem& p, Random& random) {
  const Data<E, Out> data(p, random);
  const std::vector<AnyTensor> sources = data.sources(p);
  for (const DType format : formats_of<E>()) {
    const PackedMatrix w = cuda::pack<E>(*device, device, std::span<const AnyTensor>(sources), format, p.gated);
    CHECK(w.rows == p.rows());
    CHECK(w.cols == p.k);
    const std::vector<Out> y = run(*device, w, p, data);
    const bool in_y = !p.gated && !(p.residual && p.alias);  // sums that wait for their epilogue there are not rounded to E where y is wide
    const bool stored = !is_block_format(format) && p.m > cuda::gemv_policy.most_tokens && !(in_y && !std::is_same_v<E, Out>);
    const Worst worst = compare(p, data, as_stored(data.w, p.rows(), p.k, format), y, stored);
    CHECK_MESSAGE(worst.passed(), dtype_name(dtype_of<E>), " to ", dtype_name(dtype_of<Out>), ", weights ", dtype_name(format), ", ", p.string(),
                  " at ", worst.where());
  }
}

void check_all_elements(const std::shared_ptr<cuda::Device>& device, const Problem& p, Random& random) {
  check<float, float>(device, p, random);
  check<Half, Half>(device, p, random);
  check<Bf16, Bf16>(device, p, random);
  if (!p.gated) check<Bf16, float>(device, p, random);
}

/// A size at which pieces, blocks, tiles begin or end, or any other.
std::int64_t size(Random& random, std::int64_t largest) {
  static constexpr std::int64_t edges[] = {1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40, 63, 64, 65, 96, 127, 128, 129, 191, 192, 193, 256, 257};
  for (;;) {
    const std::int64_t n = random.coin() ? random.integer(1, largest) : edges[static_cast<std::size_t>(random.integer(0, std::size(edges) - 1))];
    if (n <= largest) return n;
  }
}

Problem random_problem(Random& random, std::int64_t m, std::int64_t most_n, std::int64_t most_k) {
  Problem p;
  p.m = m;
  p.n = size(random, most_n);
  p.k = size(random, most_k);
  p.gated = random.integer(0, 2) == 0;
  p.bias = random.coin();
  p.residual = random.coin();
  p.alias = random.coin();
  p.extra = random.integer(0, 2) == 0 ? random.integer(1, 9) : random.integer(0, 2) * 8;
  p.offset = random.integer(0, 3) == 0 ? random.integer(1, 3) : 0;
  p.activation = activations[static_cast<std::size_t>(random.integer(0, 5))];
  p.first_rows = p.gated ? 0 : random.integer(0, p.n);
  return p;
}

TEST_CASE("linear: one to eight rows, all epilogues and strides") {
  Random random(501);
  const auto device = device_with(2);
  for (std::int64_t m = 1; m <= 8; ++m)
    for (int trial = 0; trial < 3; ++trial) check_all_elements(device, random_problem(random, m, 40, 300), random);
  check_all_elements(device, {.m = 1, .n = 1, .k = 1, .first_rows = 1}, random);
  check_all_elements(device, {.m = 2, .n = 24, .k = 4100, .bias = true, .first_rows = 24}, random);  // several batches of pieces
}

TEST_CASE("linear: nine to forty rows, all epilogues and strides") {
  Random random(502);
  const auto device = device_with(132);
  for (const std::int64_t m : {9, 15, 16, 17, 24, 31, 32, 33, 40}) check_all_elements(device, random_problem(random, m, 70, 200), random);
}

TEST_CASE("linear: many rows, small and large blocks") {
  Random random(503);
  const auto small = device_with(132), large = device_with(1);
  for (const std::int64_t m : {64, 65, 100}) check_all_elements(small, random_problem(random, m, 100, 330), random);
  for (const std::int64_t m : {128, 130}) check_all_elements(large, random_problem(random, m, 150, 330), random);
  check<Bf16, Bf16>(
      large, {.m = 150, .n = 70, .k = 512, .gated = true, .bias = true, .residual = true, .alias = true, .activation = Activation::silu}, random);
}

TEST_CASE("linear: every activation, alone and gated, on each way to compute it") {
  Random random(504);
  const auto device = device_with(132);
  for (const Activation activation : activations)
    for (const bool gated : {false, true})
      for (const std::int64_t m : {1, 12, 34})
        check<Bf16, Bf16>(device, {.m = m, .n = 20, .k = 64, .gated = gated, .activation = activation, .first_rows = gated ? 0 : 20}, random);
}

TEST_CASE("linear: a row of x has the same result alone and among others") {
  Random random(505);
  const auto device = device_with(16);
  Problem p{.m = 32, .n = 37, .k = 700, .bias = true, .residual = true, .activation = Activation::silu, .first_rows = 37};
  const Data<Bf16, Bf16> data(p, random);
  const std::vector<AnyTensor> sources = data.sources(p);
  for (const DType format : formats_of<Bf16>()) {
    const std::int64_t most = is_block_format(format) ? cuda::few_rows_policy.most_tokens : cuda::gemv_policy.most_tokens;
    const PackedMatrix w = cuda::pack<Bf16>(*device, device, std::span<const AnyTensor>(sources), format, false);
    const auto rows = [&](std::int64_t begin, std::int64_t end) {
      Problem part = p;
      part.m = end - begin;
      Data<Bf16, Bf16> cut = data;
      cut.x.assign(data.x.begin() + begin * p.k, data.x.begin() + end * p.k);
      cut.residual.assign(data.residual.begin() + begin * p.n, data.residual.begin() + end * p.n);
      return run(*device, w, part, cut);
    };
    const std::vector<Bf16> at_once = rows(0, most);
    std::vector<Bf16> parts;
    for (std::int64_t i = 0, step = 1; i < most; i += step, step = step % 5 + 1) {
      const std::vector<Bf16> part = rows(i, std::min(most, i + step));
      parts.insert(parts.end(), part.begin(), part.end());
    }
    CHECK_MESSAGE(same_bits(at_once, parts), dtype_name(format));
  }
}

/// Blocks that nothing would quantise to: any scale, q8 down to -128.
template <class Block>
AnyTensor random_blocks(Random& random, std::int64_t rows, std::int64_t cols, std::vector<double>& values) {
  auto blocks = std::make_shared<std::vector<Block>>();
  for (std::int64_t b = 0; b < rows * cols / block_values; ++b) {
    Block block{.scale = to_half(std::ldexp(random.coin() ? 1.0F : -1.5F, static_cast<int>(random.integer(-6, 0))))};
    if constexpr (Block::dtype == DType::q8)
      for (auto& v : block.values) v = static_cast<std::int8_t>(random.integer(-128, 100));
    else
      for (auto& v : block.pairs) v = static_cast<std::uint8_t>(random.integer(0, 255));
    for (std::int64_t i = 0; i < block_values; ++i) values.push_back(static_cast<double>(dequantise(block, i)));
    blocks->push_back(block);
  }
  const auto* bytes = reinterpret_cast<const std::byte*>(blocks->data());
  return AnyTensor(Block::dtype, Shape{rows, cols}, bytes, blocks);
}

template <class E, class Block>
void check_taken_over(bool gated, std::int64_t m) {
  Random random(506);
  const auto device = device_with(132);
  const std::int64_t n = 19, k = 96;  // a column tile and a half
  std::vector<double> w;
  const AnyTensor sources[] = {random_blocks<Block>(random, n, k, w), random_blocks<Block>(random, n, k, w)};
  const PackedMatrix packed = cuda::pack<E>(*device, device, std::span<const AnyTensor>(sources), Block::dtype, gated);
  // With x of small integers every sum is exact.
  Problem p{.m = m, .n = gated ? n : 2 * n, .k = k, .gated = gated};
  Data<E, float> data(p, random);
  for (E& x : data.x) x = element<E>(static_cast<float>(random.integer(-3, 3)));
  const std::vector<float> y = run(*device, packed, p, data);
  for (std::int64_t i = 0; i < m; ++i)
    for (std::int64_t j = 0; j < p.n; ++j) {
      const auto product = [&](std::int64_t row) {
        double sum = 0;
        for (std::int64_t c = 0; c < k; ++c)
          sum += static_cast<double>(to_float(data.x[static_cast<std::size_t>(i * k + c)])) * w[static_cast<std::size_t>(row * k + c)];
        return sum;
      };
      const double expected = gated ? static_cast<double>(static_cast<float>(product(j)) * static_cast<float>(product(n + j))) : product(j);
      REQUIRE_MESSAGE(static_cast<double>(y[static_cast<std::size_t>(i * p.n + j)]) == expected, dtype_name(dtype_of<E>), " ",
                      dtype_name(Block::dtype), " gated=", gated, " m=", m, " at ", i, ", ", j);
    }
}

TEST_CASE("pack: blocks of the format are taken over as they are") {
  for (const bool gated : {false, true})
    for (const std::int64_t m : {3, 34}) {
      check_taken_over<float, Q8Block>(gated, m);
      check_taken_over<float, Q4Block>(gated, m);
      check_taken_over<Half, Q8Block>(gated, m);
      check_taken_over<Half, Q4Block>(gated, m);
      check_taken_over<Bf16, Q8Block>(gated, m);
      check_taken_over<Bf16, Q4Block>(gated, m);
    }
}

TEST_CASE("linear: NaN and infinity stay in their row, whatever lies between rows and behind columns") {
  const auto device = device_with(132);
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (const std::int64_t m : {3, 20, 40})
    for (const std::int64_t extra : {0, 1}) {
      const auto check_element = [&]<class E>(E) {
        Problem p{.m = m, .n = 5, .k = 40, .extra = extra, .first_rows = 5};
        Random random(507);
        Data<E, E> data(p, random);
        for (float& w : data.w) w = 1;
        data.x[static_cast<std::size_t>(p.k + 7)] = element<E>(nan);
        data.x[static_cast<std::size_t>(2 * p.k + 39)] = element<E>(-inf);
        const std::vector<AnyTensor> sources = data.sources(p);
        for (const DType format : formats_of<E>()) {
          const PackedMatrix w = cuda::pack<E>(*device, device, std::span<const AnyTensor>(sources), format, false);
          const std::vector<double> y = doubles(run(*device, w, p, data));
          for (std::int64_t i = 0; i < m; ++i)
            for (std::int64_t j = 0; j < p.n; ++j) {
              const double value = y[static_cast<std::size_t>(i * p.n + j)];
              CHECK_MESSAGE((i == 1   ? std::isnan(value)
                             : i == 2 ? value == -HUGE_VAL
                                      : std::isfinite(value)),
                            dtype_name(dtype_of<E>), " ", dtype_name(format), " m=", m, " row ", i, ": ", value);
            }
        }
      };
      check_element(float{});
      check_element(Half{});
      check_element(Bf16{});
    }
}

TEST_CASE("pack: sources of other types, of rank 4, below each other") {
  Random random(508);
  const auto device = device_with(16);
  const Problem p{.m = 2, .n = 15, .k = 12, .first_rows = 15};
  Data<Bf16, Bf16> data(p, random);
  for (float& w : data.w) w = to_float(to_bf16(w));
  Tensor<Half> half(Shape{5, 3, 2, 2});
  Tensor<double> wide(Shape{4, 3, 2, 2});
  Tensor<Bf16> narrow(Shape{6, 12});
  for (std::int64_t i = 0; i < 60; ++i) half.data()[i] = to_half(data.w[static_cast<std::size_t>(i)]);
  for (std::int64_t i = 0; i < 48; ++i) wide.data()[i] = static_cast<double>(data.w[static_cast<std::size_t>(60 + i)]);
  for (std::int64_t i = 0; i < 72; ++i) narrow.data()[i] = to_bf16(data.w[static_cast<std::size_t>(108 + i)]);
  const AnyTensor mixed[] = {AnyTensor(std::move(half)), AnyTensor(std::move(wide)), AnyTensor(std::move(narrow))};
  const std::vector<AnyTensor> plain = data.sources(p);
  for (const DType format : formats_of<Bf16>()) {
    const PackedMatrix a = cuda::pack<Bf16>(*device, device, std::span<const AnyTensor>(mixed), format, false);
    const PackedMatrix b = cuda::pack<Bf16>(*device, device, std::span<const AnyTensor>(plain), format, false);
    CHECK(a.rows == 15);
    CHECK(a.cols == 12);
    CHECK_MESSAGE(same_bits(run(*device, a, p, data), run(*device, b, p, data)), dtype_name(format));
  }
}

TEST_CASE("pack: a format that there is none of") {
  const auto device = device_with(16);
  const AnyTensor source = tensor_of(std::vector<float>(12).data(), 3, 4);
  CHECK(cuda::has_format<Bf16>(DType::q4));
  CHECK_FALSE(cuda::has_format<Bf16>(DType::f16));
  CHECK_THROWS_AS(cuda::pack<Bf16>(*device, device, std::span(&source, 1), DType::f16, false), OptionError);
  const std::string message = [&] {
    try {
      cuda::pack<Half>(*device, device, std::span(&source, 1), DType::bf16, false);
    } catch (const OptionError& error) {
      return std::string(error.what());
    }
    return std::string();
  }();
  CHECK_MESSAGE((message.find("bf16") != std::string::npos && message.find("f16, q8 and q4") != std::string::npos), message);
}

TEST_CASE("a packed matrix gives its memory back, and lives longer than what it was made from") {
  const auto device = device_with(16);
  const std::size_t before = device->available();
  {
    PackedMatrix w;
    {
      const AnyTensor source = tensor_of(std::vector<float>(64 * 64).data(), 64, 64);
      w = cuda::pack<Half>(*device, device, std::span(&source, 1), DType::q8, false);
    }
    CHECK(device->available() < before);
  }
  CHECK(device->available() == before);
}

TEST_CASE("the layout of q8 and q4: sizes, and where a value is") {
  using cuda::QuantisedLayout;
  constexpr QuantisedLayout q4{DType::q4, false, 4096, 4096}, q8{DType::q8, false, 4096, 4096};
  static_assert(q4.bytes() == 4096 * 4096 * 9 / 16);  // 4.5 and 8.5 bits per weight
  static_assert(q8.bytes() == 4096 * 4096 * 17 / 16);
  constexpr QuantisedLayout odd{DType::q4, false, 17, 65};
  static_assert(odd.row_tiles() == 2 && odd.column_tiles() == 2 && odd.scales_at() == 1024 && odd.row_tile_bytes() == 1024 + 128);
  constexpr QuantisedLayout gated{DType::q8, true, 18, 32};  // 9 + 9 rows: two tiles of 8 + 8
  static_assert(gated.row_tiles() == 2 && gated.matrix_row(0, 7) == 7 && gated.matrix_row(0, 8) == 9 && gated.matrix_row(1, 0) == 8 &&
                gated.matrix_row(1, 8) == 17);
  static_assert(gated.matrix_row(1, 1) >= 18 && gated.matrix_row(1, 9) >= 18);

  // One value at a time: row 11 = 8 + 3, column 32 + 13 = block 1, lane 4·3 + 1, the sixth of its eight.
  std::vector<Q4Block> blocks4(32);
  std::vector<Q8Block> blocks8(32);
  for (Q4Block& block : blocks4) block.pairs.fill(0x88);  // zeros
  blocks4[11 * 2 + 1].pairs[13] = 0x8b;
  blocks4[11 * 2 + 1].scale = to_half(3);
  blocks8[11 * 2 + 1].values[13] = -5;
  const auto tile_of = [](DType format, const void* blocks) {
    const QuantisedLayout layout{format, false, 16, 64};
    const AnyTensor source(format, Shape{16, 64}, static_cast<const std::byte*>(blocks), nullptr);
    std::vector<std::byte> out(layout.row_tile_bytes());
    std::vector<float> row(64);
    cuda::pack_row_tile(layout, std::span(&source, 1), 0, row, out.data());
    return out;
  };
  const std::vector<std::byte> tile4 = tile_of(DType::q4, blocks4.data()), tile8 = tile_of(DType::q8, blocks8.data());
  std::uint32_t word = 0;
  std::memcpy(&word, tile4.data() + 13 * 16 + 3 * 4, 4);
  CHECK(word == 0x8b888888U);  // value 5 = 2·2 + 1 is in bits 4·2 + 16
  CHECK(tile8[512 + 13 * 16 + 8 + 5] == std::byte{128 - 5});
  Half scale;
  std::memcpy(&scale, tile4.data() + 512 + (3 * 4 + 1 * 2 + 1) * 2, 2);
  CHECK(to_float(scale) == 3);
}

TEST_CASE("what is launched: warps per row, blocks, shared memory") {
  using namespace cuda;
  // 7B dims in bf16 on 132 multiprocessors: 4096 rows of 8 KB make 2048 warps, and 4224 are wanted.
  CHECK(warps_per_row(4096, 4096, 2, 132) == 4);
  CHECK(warps_per_row(22016, 4096, 2, 132) == 1);
  CHECK(warps_per_row(4096, 11008, 2, 132) == 4);
  CHECK(warps_per_row(32000, 4096, 2, 132) == 1);
  CHECK(warps_per_row(256, 2048, 2, 132) == 2);  // two batches of 2 KB in a row of 4 KB
  CHECK(warps_per_row(16, 100, 2, 132) == 1);
  CHECK(warps_per_row(64, 1 << 20, 2, 132) == gemv_policy.warps);
  CHECK_FALSE(wants_large_blocks(128, 4096 / 16, 132));
  CHECK(wants_large_blocks(2048, 4096 / 16, 132));
  static_assert(LargeBlock::threads == 256 && LargeBlock::tokens == 128 && LargeBlock::row_tiles * 16 == 128);
  static_assert(SmallBlock::threads == 128 && SmallBlock::tokens == 64 && SmallBlock::row_tiles * 16 == 64);
  // sm_80 and later give a block 99 KB at least (CUDA C++ programming guide, technical specifications per compute capability).
  static_assert(LargeBlock::shape.shared_bytes(sizeof(float)) <= 99 * 1024 && SmallBlock::shape.shared_bytes(sizeof(float)) <= 99 * 1024);
  static_assert(LargeBlock::shape.shared_bytes(sizeof(Bf16)) == 3 * 128 * 64 * 2);
}

TEST_CASE("pieces of x in shared memory: lanes that are served together meet different banks") {
  const auto banks_of = [](auto element, int eight, int b, int j) {
    using E = decltype(element);
    constexpr int pieces = cuda::Operand<E>::words / 4;
    std::uint32_t banks = 0;
    for (int lane = 8 * eight; lane < 8 * eight + 8; ++lane) {
      const int row = lane / 4, piece = cuda::piece_at<E>(row, (b * 4 + lane % 4) * pieces + j);
      banks |= 1U << ((row * 64 * static_cast<int>(sizeof(E)) / 16 + piece) % 8);
    }
    return banks;
  };
  for (int eight = 0; eight < 4; ++eight)
    for (int b = 0; b < 2; ++b) {
      CHECK(banks_of(Bf16{}, eight, b, 0) == 0xff);
      for (int j = 0; j < 2; ++j) CHECK(banks_of(float{}, eight, b, j) == 0xff);
    }
}

}  // namespace
