// pack and linear: Cpu at every level and format, and Reference<float>, against Reference<double>.
//
// The bound on an output, with u = 2^-24 (unit roundoff of f32) and k inputs. The operands are exact in both computations: the
// weights are rounded to the format before they are packed, and where the kernels round x to bf16 the oracle gets the rounded x.
//   z = Σ x·w + b      k + 1 roundings at most:  |δz| ≤ (k + 2)·u·S, S = Σ |x|·|w| + |b|      (Higham, γ_k; twice that where a
//                      product is rounded apart from its sum, as in the baseline, which has no fused multiply-add)
//   f(z)               |δf| ≤ L·|δz| + 16·u·|z|: L = 1.2 bounds |f'| of every activation; 16 roundings: exp to 2 ulp, its argument
//                      to 4 (times max |a|·σ(a)(1-σ(a)) < 1), one division, and erf's 1.5e-7/2 = 1.3 u
//   f(z)·z'            |δ| ≤ |f|·|δz'| + |z'|·|δf| + |δf|·|δz'| + u·|f·z'|
//   … + residual       + u·|y|
// and 2^-126·k for products that underflow (the BF16 instruction flushes subnormals).
//
// With weights in blocks x is rounded to blocks of 8 bits, each row for itself. The oracle gets the rounded x; then all sums inside a
// block are exact, and a block's sum is rounded when it is multiplied by its two scales and added: 3 roundings per block (32 inputs, 128 in
// q4_128, the row in w8a8) at most; a sum of more than 2^24 is rounded when it becomes an f32: one more. Of w8a8, whose scales are f32, the
// oracle's weights are rounded too, and packing them again can give the scale's neighbour: two more. In prefill at level amx x and the weights of q8
// and q4 are rounded to bf16, each once: the oracle gets both rounded, and the bound is that of weights in bf16. That the rounding of x itself is what
// it should be, half a step at most, is a test of its own.
#include <doctest/doctest.h>

#include <m2lm/core.hpp>

#include "ops_support.hpp"

namespace {

using namespace m2lm_test;

constexpr std::array<Activation, 6> activations{Activation::none,      Activation::relu,       Activation::silu, Activation::gelu,
                                                Activation::gelu_tanh, Activation::quick_gelu};

struct Problem {
  std::int64_t m = 0, n = 0, k = 0;  // n outputs
  bool gated = false, bias = false, residual = false, alias = false;
  std::int64_t extra = 0;  // columns between the rows of x, y and the residual
  Activation activation = Activation::none;
  std::int64_t first_rows = 0;  // rows of the first of two sources (not gated)

  std::string string() const {
    return concat("m=", m, " n=", n, " k=", k, " gated=", gated, " bias=", bias, " residual=", residual, " alias=", alias, " extra=", extra,
                  " activation=", static_cast<int>(activation), " first=", first_rows);
  }
};

struct Data {
  Tensor<float> x, bias, residual;
  std::vector<AnyTensor> sources;
  Tensor<double> weight;  // all rows

  Data(const Problem& p, DType format, Random& random) {
    const std::int64_t rows = p.gated ? 2 * p.n : p.n;
    x = random_tensor<float>(random, Shape{p.m, p.k});
    bias = random_tensor<float>(random, Shape{1, rows});
    residual = random_tensor<float>(random, Shape{p.m, p.n});
    Tensor<float> w = random_tensor<float>(random, Shape{rows, p.k}, format);
    weight = converted<double>(w);
    const std::int64_t cut = p.gated ? p.n : p.first_rows;
    const auto part = [&](std::int64_t begin, std::int64_t end) {
      Tensor<float> t(Shape{end - begin, p.k});
      std::copy(w.data() + begin * p.k, w.data() + end * p.k, t.data());
      // In the checkpoint's own dtype: bf16 values come as bf16.
      if (format == DType::f32 || (is_quantised(format) && !is_block_format(format))) return AnyTensor(std::move(t));
      // Values that blocks hold make the same blocks again; so they may come either way.
      if (is_block_format(format)) return p.k % block_values == 0 && end % 2 == 0 ? in_blocks(t, format) : AnyTensor(std::move(t));
      Tensor<Bf16> b(t.shape());
      for (std::int64_t i = 0; i < t.elements(); ++i) b.data()[i] = to_bf16(t.data()[i]);
      return AnyTensor(std::move(b));
    };
    if (cut > 0) sources.push_back(part(0, cut));
    if (cut < rows) sources.push_back(part(cut, rows));
  }

  /// The same with all weights rounded to bf16, for the oracle.
  void round_weights() {
    for (double& w : weight.span()) w = static_cast<double>(rounded(static_cast<float>(w), DType::bf16));
    const double* from = weight.data();
    for (AnyTensor& source : sources) {
      Tensor<double> values(source.shape());
      std::copy_n(from, values.elements(), values.data());
      from += values.elements();
      source = AnyTensor(std::move(values));
    }
  }
};

struct Expected {
  Tensor<double> value, bound;
};

/// Reference<double> on x (as the kernel sees it), and the bound derived above for sums with so many roundings.
template <class T>
Expected expected(const Problem& p, const Data& data, const Tensor<T>& x, double roundings) {
  Runner<Reference<double>> reference;
  const PackedMatrix w = ops::pack(reference.ctx, std::span<const AnyTensor>(data.sources), DType::f32, p.gated);
  const Tensor<double> xd = converted<double>(x), bias = converted<double>(data.bias), residual = converted<double>(data.residual);
  Expected e{Tensor<double>(Shape{p.m, p.n}), Tensor<double>(Shape{p.m, p.n})};
  Epilogue<double> epilogue{.bias = p.bias ? bias.data() : nullptr, .activation = p.activation, .residual = {}};
  if (p.residual) epilogue.residual = matrix(residual);
  ops::linear(reference.ctx, matrix(xd), w, epilogue, e.value.view<2>());

  const double chain = roundings + 2;
  for (std::int64_t i = 0; i < p.m; ++i)
    for (std::int64_t j = 0; j < p.n; ++j) {
      const auto product = [&](std::int64_t output) {
        double z = p.bias ? bias.data()[output] : 0, s = std::abs(z);
        for (std::int64_t c = 0; c < p.k; ++c) {
          const double term = xd.data()[i * p.k + c] * data.weight.data()[output * p.k + c];
          z += term;
          s += std::abs(term);
        }
        return std::pair{z, chain * u32 * s + static_cast<double>(p.k) * 0x1.0p-126};
      };
      const auto [z, dz] = product(j);
      double f = detail::apply_activation(p.activation, z);
      double bound = p.activation == Activation::none ? dz : 1.2 * dz + 16 * u32 * std::abs(z);
      if (p.gated) {
        const auto [z2, dz2] = product(p.n + j);
        bound = std::abs(f) * dz2 + std::abs(z2) * bound + bound * dz2 + u32 * std::abs(f * z2);
        f *= z2;
      }
      e.bound.data()[i * p.n + j] = bound + u32 * std::abs(e.value.data()[i * p.n + j]);
    }
  return e;
}

template <class B>
void check(Runner<B>& runner, const Problem& p, const Data& data, DType format, const Expected& e, const std::string& name) {
  using S = ScalarOf<B>;
  const PackedMatrix w = ops::pack(runner.ctx, std::span<const AnyTensor>(data.sources), format, p.gated);
  CHECK(w.cols == p.k);
  CHECK(w.rows == (p.gated ? 2 * p.n : p.n));
  const S nan = std::numeric_limits<S>::quiet_NaN();
  Strided<S> x(converted<S>(data.x), p.extra, nan), y(Shape{p.m, p.n}[0], p.n, p.extra, S(-77)), residual(converted<S>(data.residual), p.extra, nan);
  const Tensor<S> bias = converted<S>(data.bias);
  Epilogue<S> epilogue{.bias = p.bias ? bias.data() : nullptr, .activation = p.activation, .residual = {}};
  if (p.residual && p.alias) {
    for (std::int64_t i = 0; i < p.m; ++i)
      for (std::int64_t j = 0; j < p.n; ++j) y.view()(i, j) = static_cast<S>(data.residual.data()[i * p.n + j]);
    epilogue.residual = y.view();
  } else if (p.residual) {
    epilogue.residual = residual.view();
  }
  ops::linear(runner.ctx, Matrix<const S>(x.view()), w, epilogue, y.view());
  Worst worst;
  for (std::int64_t i = 0; i < p.m; ++i)
    for (std::int64_t j = 0; j < p.n; ++j)
      worst.add(static_cast<double>(y.view()(i, j)), e.value.data()[i * p.n + j], e.bound.data()[i * p.n + j], i, j);
  CHECK_MESSAGE(worst.passed(), name, " ", p.string(), " at ", worst.where());
  CHECK_MESSAGE(y.gaps_untouched(), name, " ", p.string(), ": wrote between the rows of y");
}

/// x as products with weights of `format` see it.
Tensor<double> as_seen(const Tensor<float>& x, DType format) {
  Tensor<double> out = converted<double>(x);
  if (format == DType::bf16)
    for (double& v : out.span()) v = static_cast<double>(rounded(static_cast<float>(v), DType::bf16));
  if (!is_quantised(format)) return out;
  const std::int64_t columns = x.shape()[1], block = scale_inputs(format, columns);
  for (std::int64_t row = 0; row < x.shape()[0]; ++row)
    for (std::int64_t first = 0; first < columns; first += block) {
      const std::int64_t begin = row * columns + first, end = begin + std::min(block, columns - first);
      float largest = 0;
      for (std::int64_t i = begin; i < end; ++i) largest = std::max(largest, std::abs(x.data()[i]));
      const float scale = largest / 127.0F, inverse = scale > 0 ? 1.0F / scale : 0.0F;
      for (std::int64_t i = begin; i < end; ++i) out.data()[i] = static_cast<double>(scale) * std::nearbyint(static_cast<double>(x.data()[i] * inverse));
    }
  return out;
}

/// Roundings of a sum of products with weights that are integers.
double roundings_of(std::int64_t k, DType format) {
  return 4 * std::ceil(static_cast<double>(k) / static_cast<double>(scale_inputs(format, k))) + (format == DType::w8a8 ? 2 : 0);
}

/// What the kernels of `format` do with the data, by the oracle.
Expected expected_of(const Problem& p, const Data& data, DType format, bool rounds_to_bf16) {
  const auto k = static_cast<double>(p.k);
  if (is_quantised(format)) return expected(p, data, as_seen(data.x, format), roundings_of(p.k, format));
  return rounds_to_bf16 ? expected(p, data, as_seen(data.x, DType::bf16), k) : expected(p, data, data.x, 2 * k);
}

void check_everywhere(const Problem& p, std::uint64_t seed) {
  for (const DType format : weight_formats) {
    Random random(seed);
    const Data data(p, format, random);
    const Expected plain = expected_of(p, data, format, false);
    for (const Variant& variant : variants(format)) {
      Runner<Cpu> cpu(Cpu(variant.options(2)));
      cpu.ctx.phase = variant.phase;
      CHECK(cpu.backend.isa() == variant.level);
      CHECK(rounds_activations(cpu.backend, format, variant.phase) == variant.bf16_dot);
      if (variant.phase == Phase::prefill) {
        Random again(seed);
        Data in_bf16(p, format, again);
        in_bf16.round_weights();
        check(cpu, p, data, format, expected(p, in_bf16, as_seen(data.x, DType::bf16), static_cast<double>(p.k)), label(variant, format));
      } else if (rounds_activations(cpu.backend, format))
        check(cpu, p, data, format, expected_of(p, data, format, true), label(variant, format));
      else
        check(cpu, p, data, format, plain, label(variant, format));
    }
    Runner<Reference<float>> reference;
    check(reference, p, data, format, expected(p, data, data.x, 2 * static_cast<double>(p.k)), "Reference<float>");
  }
}

TEST_CASE("linear: random shapes, epilogues and strides") {
  Random random(301);
  for (int trial = 0; trial < 60; ++trial) {
    Problem p;
    p.m = random.size(65);
    p.n = random.size(129);
    p.k = random.size(193);
    p.gated = random.integer(0, 3) == 0;
    p.bias = random.coin();
    p.residual = random.coin();
    p.alias = random.coin();
    p.extra = random.coin() ? random.integer(1, 9) : 0;
    p.activation = activations[static_cast<std::size_t>(random.integer(0, 5))];
    p.first_rows = p.gated ? 0 : random.integer(0, p.n);
    check_everywhere(p, 1000 + static_cast<std::uint64_t>(trial));
  }
}

TEST_CASE("linear: every activation, alone and gated, over the whole range of its argument") {
  for (const Activation activation : activations)
    for (const bool gated : {false, true}) {
      Problem p{.m = 7, .n = 45, .k = 300, .gated = gated, .bias = true, .residual = false, .alias = false, .extra = 0, .activation = activation};
      check_everywhere(p, 77);
    }
}

TEST_CASE("linear: sizes of zero") {
  for (const bool gated : {false, true}) {
    check_everywhere({.m = 0, .n = 33, .k = 17, .gated = gated, .first_rows = 5}, 1);
    check_everywhere({.m = 3, .n = 33, .k = 0, .gated = gated, .bias = true, .residual = true, .activation = Activation::gelu, .first_rows = 5}, 2);
    check_everywhere({.m = 1, .n = 1, .k = 0, .gated = gated, .first_rows = 1}, 3);
  }
}

TEST_CASE("linear: several k blocks and row blocks") {
  check_everywhere({.m = 3, .n = 70, .k = 4099, .bias = true, .residual = true, .alias = true, .first_rows = 33}, 4);
  check_everywhere({.m = 401, .n = 67, .k = 150, .gated = true, .bias = true, .extra = 3, .activation = Activation::silu}, 5);
  check_everywhere({.m = 197, .n = 33, .k = 1031, .residual = true, .extra = 1, .activation = Activation::quick_gelu, .first_rows = 1}, 6);
  check_everywhere({.m = 25, .n = 1100, .k = 769, .bias = true, .residual = true, .alias = true, .first_rows = 600}, 7);
}

TEST_CASE("linear: large and small arguments of the activations") {
  // One input and weight 1: y = f(x), with x exact in bf16.
  const std::vector<float> values{0.0F, -0.0F, 1e-30F, -1e-30F, 0.0078125F, 0.5F, -0.5F, 1.0F, -1.0F, 3.0F,  -3.0F,
                                  5.5F, -5.5F, 20.0F,  -20.0F,  88.0F,      -88.0F, 200.0F, -200.0F, 60000.0F, -60000.0F};
  for (const Activation activation : activations)
    for (const DType format : formats)  // in blocks x would be rounded
      for (const Variant& variant : variants(format)) {
        Runner<Cpu> cpu(Cpu(variant.options(1)));
        Tensor<float> one(Shape{1, 1}), x(Shape{static_cast<std::int64_t>(values.size()), 1}), y(x.shape());
        one.data()[0] = 1;
        for (std::size_t i = 0; i < values.size(); ++i) x.data()[i] = rounded(values[i], DType::bf16);
        const AnyTensor weight(std::move(one));
        const PackedMatrix w = ops::pack(cpu.ctx, std::span(&weight, 1), format);
        ops::linear(cpu.ctx, matrix(x), w, Epilogue<float>{.bias = nullptr, .activation = activation, .residual = {}}, y.view<2>());
        Worst worst;
        for (std::int64_t i = 0; i < x.elements(); ++i) {
          const double z = static_cast<double>(x.data()[i]);
          worst.add(static_cast<double>(y.data()[i]), detail::apply_activation(activation, z), 16 * u32 * std::abs(z) + 0x1.0p-126, i, 0);
        }
        CHECK_MESSAGE(worst.passed(), label(variant, format), " activation ", static_cast<int>(activation), " at ", worst.where());
      }
}

TEST_CASE("linear: a row has the same bits alone, in a batch, and on any number of threads") {
  Random random(302);
  for (int trial = 0; trial < 16; ++trial) {
    Problem p;
    p.m = trial == 0 ? 403 : random.size(129);
    p.n = random.size(193);
    p.k = trial == 1 ? 2051 : random.size(300);
    p.gated = random.coin();
    p.bias = p.residual = random.coin();
    p.activation = activations[static_cast<std::size_t>(random.integer(0, 5))];
    p.first_rows = p.gated ? 0 : p.n;
    for (const DType format : weight_formats) {
      Random data_random(2000 + static_cast<std::uint64_t>(trial));
      const Data data(p, format, data_random);
      for (const Variant& variant : variants(format)) {
        Tensor<float> first(Shape{p.m, p.n});
        for (const int threads : {1, 2, 3, 4}) {
          Runner<Cpu> cpu(Cpu(variant.options(threads)));
          cpu.ctx.phase = variant.phase;
          const PackedMatrix w = ops::pack(cpu.ctx, std::span<const AnyTensor>(data.sources), format, p.gated);
          Tensor<float> y(Shape{p.m, p.n});
          const auto run = [&](std::int64_t begin, std::int64_t end) {
            Epilogue<float> epilogue{.bias = p.bias ? data.bias.data() : nullptr, .activation = p.activation, .residual = {}};
            if (p.residual) epilogue.residual = matrix(data.residual).rows(begin, end);
            ops::linear(cpu.ctx, matrix(data.x).rows(begin, end), w, epilogue, y.view<2>().rows(begin, end));
          };
          run(0, p.m);
          if (threads == 1) first = y.clone();
          CHECK_MESSAGE(same_bits(matrix(y), matrix(first)), label(variant, format), " ", threads, " threads at once, ", p.string());
          for (float& v : y.span()) v = -1;
          for (std::int64_t i = 0; i < p.m; ++i) run(i, i + 1);
          CHECK_MESSAGE(same_bits(matrix(y), matrix(first)), label(variant, format), " ", threads, " threads, rows alone, ", p.string());
          for (float& v : y.span()) v = -1;
          for (std::int64_t i = 0; i < p.m;) {
            const std::int64_t end = std::min(p.m, i + random.integer(1, 29));
            run(i, end);
            i = end;
          }
          CHECK_MESSAGE(same_bits(matrix(y), matrix(first)), label(variant, format), " ", threads, " threads, chunks, ", p.string());
        }
      }
    }
  }
}

TEST_CASE("linear: rows that are too long to stay in cache, and fewer than are walked at once, have the bits of each alone") {
  const Problem p{.m = 65, .n = 640, .k = 5633, .bias = true, .first_rows = 640};
  for (const auto& [format, phase] :
       {std::pair{DType::bf16, Phase::decode}, {DType::w8a8, Phase::decode}, {DType::q8, Phase::prefill}, {DType::q4, Phase::prefill}}) {
    Random random(2100);
    const Data data(p, format, random);
    for (const int threads : {1, 2}) {
      Runner<Cpu> cpu(Cpu({.threads = threads}));
      cpu.ctx.phase = phase;
      const PackedMatrix w = ops::pack(cpu.ctx, std::span<const AnyTensor>(data.sources), format);
      Tensor<float> y(Shape{p.m, p.n}), alone(Shape{1, p.n});
      const Epilogue<float> epilogue{.bias = data.bias.data(), .activation = p.activation, .residual = {}};
      ops::linear(cpu.ctx, matrix(data.x), w, epilogue, y.view<2>());
      for (std::int64_t i = 0; i < p.m; i += 32) {
        ops::linear(cpu.ctx, matrix(data.x).rows(i, i + 1), w, epilogue, alone.view<2>());
        CHECK_MESSAGE(same_bits(matrix(y).rows(i, i + 1), matrix(alone)), dtype_name(format), " ", threads, " threads, row ", i);
      }
    }
  }
}

TEST_CASE("linear: only q8 and q4 at level amx, where bf16 is multiplied by bf16, compute a prompt otherwise than a step") {
  Random random(304);
  const Problem p{.m = 19, .n = 77, .k = 333, .first_rows = 40};
  for (const DType format : weight_formats) {
    const Data data(p, format, random);
    for (const IsaLevel level : levels())
      for (const bool bf16_dot : {false, true}) {
        Runner<Cpu> cpu(Cpu({.threads = 1, .max_isa = level, .bf16_dot = bf16_dot}));
        const PackedMatrix w = ops::pack(cpu.ctx, std::span<const AnyTensor>(data.sources), format, p.gated);
        Tensor<float> step(Shape{p.m, p.n}), prompt(Shape{p.m, p.n});
        ops::linear(cpu.ctx, matrix(data.x), w, {}, step.view<2>());
        cpu.ctx.phase = Phase::prefill;
        ops::linear(cpu.ctx, matrix(data.x), w, {}, prompt.view<2>());
        const bool other = level == IsaLevel::amx && bf16_dot && (format == DType::q8 || format == DType::q4);
        CHECK_MESSAGE(same_bits(matrix(step), matrix(prompt)) == !other, isa_name(level), " ", dtype_name(format), " bf16_dot ", bf16_dot);
      }
  }
}

TEST_CASE("linear: the levels that compute alike agree bit by bit") {
  // AVX2 and AVX-512 fuse multiply and add in the same order: f32 sums cannot differ. Nor can the ways to multiply bytes, which are exact.
  Random random(303);
  const Problem p{.m = 19, .n = 77, .k = 333, .first_rows = 40};
  for (const DType format : weight_formats) {
    const Data data(p, format, random);
    std::vector<Tensor<float>> results;
    for (const Variant& variant : variants(format)) {
      if (variant.level == IsaLevel::baseline || variant.bf16_dot) continue;
      Runner<Cpu> cpu(Cpu(variant.options(1)));
      const PackedMatrix w = ops::pack(cpu.ctx, std::span<const AnyTensor>(data.sources), format, p.gated);
      results.emplace_back(Shape{p.m, p.n});
      ops::linear(cpu.ctx, matrix(data.x), w, {}, results.back().view<2>());
      CHECK_MESSAGE(same_bits(matrix(results.back()), matrix(results.front())), label(variant, format));
    }
  }
}

TEST_CASE("linear: outputs that are written past the caches have the bits of each row alone, and nothing beside them changes") {
  const Problem p{.m = 4200, .n = 1032, .k = 128, .bias = true, .first_rows = 1032};  // 16 MiB and more, and a panel that is not full
  for (const auto& [format, phase] : {std::pair{DType::bf16, Phase::decode}, {DType::w8a8, Phase::decode}, {DType::q4, Phase::decode},
                                      {DType::q4, Phase::prefill}, {DType::q4_128, Phase::decode}}) {
    Random random(2200);
    const Data data(p, format, random);
    for (const int threads : {1, 2}) {
      Runner<Cpu> cpu(Cpu({.threads = threads}));
      cpu.ctx.phase = phase;
      const PackedMatrix w = ops::pack(cpu.ctx, std::span<const AnyTensor>(data.sources), format);
      constexpr std::int64_t beside = 24;  // rows of y begin on a cache line
      Tensor<float> wide(Shape{p.m, p.n + beside}), alone(Shape{1, p.n});
      std::fill_n(wide.data(), p.m * (p.n + beside), 7.0F);
      const Epilogue<float> epilogue{.bias = data.bias.data(), .activation = p.activation, .residual = {}};
      ops::linear(cpu.ctx, matrix(data.x), w, epilogue, wide.view<2>().columns(0, p.n));
      for (std::int64_t i = 0; i < p.m; i += 71) {
        ops::linear(cpu.ctx, matrix(data.x).rows(i, i + 1), w, epilogue, alone.view<2>());
        CHECK_MESSAGE(same_bits(matrix(wide).columns(0, p.n).rows(i, i + 1), matrix(alone)), dtype_name(format), " ", threads, " threads, row ", i);
        for (std::int64_t j = p.n; j < p.n + beside; ++j) CHECK(matrix(wide)(i, j) == 7.0F);
      }
    }
  }
}

TEST_CASE("linear: weights in blocks see each input to half a step of its block, and no worse") {
  Random random(305);
  const Problem p{.m = 5, .n = 40, .k = 300, .first_rows = 40};
  for (const DType format : quantised_formats) {
    const std::int64_t block = scale_inputs(format, p.k);
    Data data(p, format, random);
    // Blocks of very different size side by side: a step is that of its own block.
    for (std::int64_t i = 0; i < data.x.elements(); ++i) data.x.data()[i] *= std::ldexp(1.0F, static_cast<int>(i % p.k / block_values * 7) - 30);
    const Expected exact = expected(p, data, data.x, roundings_of(p.k, format));
    for (const Variant& variant : variants(format)) {
      if (variant.phase == Phase::prefill) continue;  // which has no blocks of x
      Runner<Cpu> cpu(Cpu(variant.options(2)));
      const PackedMatrix w = ops::pack(cpu.ctx, std::span<const AnyTensor>(data.sources), format);
      Tensor<float> y(Shape{p.m, p.n});
      ops::linear(cpu.ctx, matrix(data.x), w, {}, y.view<2>());
      Worst worst;
      for (std::int64_t i = 0; i < p.m; ++i)
        for (std::int64_t j = 0; j < p.n; ++j) {
          double steps = 0;
          for (std::int64_t first = 0; first < p.k; first += block) {
            double largest = 0, weights = 0;
            for (std::int64_t c = first; c < std::min(p.k, first + block); ++c) {
              largest = std::max(largest, static_cast<double>(std::abs(data.x.data()[i * p.k + c])));
              weights += std::abs(data.weight.data()[j * p.k + c]);
            }
            steps += largest / 127 / 2 * (1 + 0x1.0p-15) * weights;  // 127 steps of which each is rounded in f32
          }
          worst.add(static_cast<double>(y.data()[i * p.n + j]), exact.value.data()[i * p.n + j], steps + exact.bound.data()[i * p.n + j], i, j);
        }
      CHECK_MESSAGE(worst.passed(), label(variant, format), " at ", worst.where());
      CHECK_MESSAGE(worst.ratio() > 0.01, label(variant, format), ": x was not rounded at all");
    }
  }
}

TEST_CASE("linear: weights in blocks, and inputs that are zero, not finite or hardly there") {
  constexpr float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  Random random(306);
  const Problem p{.m = 6, .n = 35, .k = 70, .first_rows = 35};
  for (const DType format : quantised_formats) {
    Data data(p, format, random);
    const auto row = [&](std::int64_t i) { return data.x.span().subspan(static_cast<std::size_t>(i * p.k), static_cast<std::size_t>(p.k)); };
    for (float& v : row(1)) v = 0;
    row(2)[69] = nan;
    row(3)[0] = infinity;
    row(3)[40] = -infinity;
    for (float& v : row(4)) v = 1e-44F;
    for (const Variant& variant : variants(format)) {
      Runner<Cpu> cpu(Cpu(variant.options(1)));
      cpu.ctx.phase = variant.phase;
      const PackedMatrix w = ops::pack(cpu.ctx, std::span<const AnyTensor>(data.sources), format);
      Tensor<float> y(Shape{p.m, p.n});
      ops::linear(cpu.ctx, matrix(data.x), w, {}, y.view<2>());
      for (std::int64_t j = 0; j < p.n; ++j) {
        CHECK(std::isfinite(y.view<2>()(0, j)));
        CHECK(y.view<2>()(1, j) == 0.0F);
        CHECK(std::isnan(y.view<2>()(2, j)));
        CHECK((variant.phase == Phase::prefill ? !std::isfinite(y.view<2>()(3, j)) : std::isnan(y.view<2>()(3, j))));
        CHECK(std::abs(y.view<2>()(4, j)) <= 70 * 4 * 2e-44F);
        CHECK(std::isfinite(y.view<2>()(5, j)));
      }
    }
  }
}

TEST_CASE("linear: blocks of a checkpoint whose scale is infinite or no number give what they give at every level") {
  Random random(308);
  constexpr std::int64_t rows = 37, columns = 96, m = 21, infinite_row = 5, nan_row = 20;
  const auto check_blocks = [&]<class Block>(Block) {
    const auto bytes = std::make_shared<std::vector<std::byte>>(dtype_bytes(Block::dtype, rows * columns));
    for (std::byte& byte : *bytes) byte = static_cast<std::byte>(random.integer(0, 255));
    constexpr std::int64_t blocks = columns / block_values;
    for (std::int64_t i = 0; i < rows * blocks; ++i) {
      auto block = load_block<Block>(bytes->data(), i);
      block.scale = to_half(i == infinite_row * blocks + 1  ? std::numeric_limits<float>::infinity()
                            : i == nan_row * blocks + 2 ? std::numeric_limits<float>::quiet_NaN()
                                                        : 0.03125F);
      std::memcpy(bytes->data() + static_cast<std::size_t>(i) * sizeof(Block), &block, sizeof(Block));
    }
    const AnyTensor source(Block::dtype, Shape{rows, columns}, bytes->data(), bytes);
    Tensor<float> x(Shape{m, columns});
    for (float& v : x.span()) v = random.value();
    std::vector<Tensor<float>> results;
    for (const Variant& variant : variants(Block::dtype)) {
      if (variant.level == IsaLevel::baseline) continue;  // has no FMA: other bits
      Runner<Cpu> cpu(Cpu(variant.options(1)));
      cpu.ctx.phase = variant.phase;
      const PackedMatrix w = ops::pack(cpu.ctx, std::span(&source, 1), Block::dtype);
      if (variant.phase == Phase::prefill) {  // other bits, but no number where there is none
        Tensor<float> y(Shape{m, rows});
        ops::linear(cpu.ctx, matrix(std::as_const(x)), w, {}, y.view<2>());
        for (std::int64_t i = 0; i < m; ++i) {
          CHECK(std::isnan(y.view<2>()(i, nan_row)));
          CHECK_FALSE(std::isfinite(y.view<2>()(i, infinite_row)));
          CHECK(std::isfinite(y.view<2>()(i, infinite_row + 1)));
        }
        continue;
      }
      results.emplace_back(Shape{m, rows});
      ops::linear(cpu.ctx, matrix(std::as_const(x)), w, {}, results.back().view<2>());
      const auto got = results.back().view<2>(), first = results.front().view<2>();
      for (std::int64_t i = 0; i < m; ++i) {
        CHECK_MESSAGE(std::isnan(got(i, nan_row)), label(variant, Block::dtype));
        CHECK_MESSAGE((got(i, infinite_row) == first(i, infinite_row) || (std::isnan(got(i, infinite_row)) && std::isnan(first(i, infinite_row)))),
                      label(variant, Block::dtype), " row ", i);
        CHECK(std::isfinite(got(i, infinite_row + 1)));
        CHECK(got(i, infinite_row + 1) == first(i, infinite_row + 1));
      }
    }
    if (!results.empty()) CHECK(std::isinf(results.front().view<2>()(0, infinite_row)));  // a machine may have no level but the baseline
  };
  check_blocks(Q8Block{});
  check_blocks(Q4Block{});
}

TEST_CASE("pack: blocks of a checkpoint are packed bit for bit") {
  Random random(307);
  constexpr std::int64_t rows = 37, columns = 96;
  Runner<Cpu> cpu(Cpu(CpuOptions{.threads = 2}));
  const auto check_blocks = [&]<class Block, class Stored>(const AnyTensor& source, Block, Stored) {
    const PackedMatrix w = ops::pack(cpu.ctx, std::span(&source, 1), Block::dtype);
    CHECK(w.bytes == static_cast<std::size_t>(4 * 3 * detail::tile_bytes(Block::dtype)));  // 37 rows are four strips of 16
    for (std::int64_t row = 0; row < rows; ++row)
      for (std::int64_t b = 0; b < columns / block_values; ++b) {
        const std::byte* tile = w.data.get() + (row / detail::strip_width * 3 + b) * detail::tile_bytes(Block::dtype);
        const auto block = detail::load_from_tile<Block>(tile, row % detail::strip_width);
        const auto stored = load_block<Stored>(source.data(), row * 3 + b);
        CHECK(block.scale == stored.scale);
        for (std::int64_t i = 0; i < block_values; ++i) CHECK(block.value(i) == stored.value(i));
      }
  };
  // Random bits: blocks that no rounding makes, with any scale.
  const auto random_blocks = [&](DType format) {
    auto bytes = std::make_shared<std::vector<std::byte>>(dtype_bytes(format, rows * columns));
    for (std::byte& byte : *bytes) byte = static_cast<std::byte>(random.integer(0, 255));
    return AnyTensor(format, Shape{rows, columns}, bytes->data(), bytes);
  };
  check_blocks(random_blocks(DType::q8), Q8Block{}, Q8Block{});
  check_blocks(random_blocks(DType::q4), Q4Block{}, Q4Block{});
}

TEST_CASE("pack: where q4_128 and w8a8 have a weight, and that it is the nearest that its scale allows") {
  Random random(309);
  constexpr std::int64_t rows = 37, columns = 300;
  Runner<Cpu> cpu(Cpu(CpuOptions{.threads = 2}));
  const Tensor<float> values = random_tensor<float>(random, Shape{rows, columns});
  const AnyTensor source(values.clone());
  const auto value = [&](std::int64_t row, std::int64_t c) { return c < columns ? values.data()[row * columns + c] : 0.0F; };
  {
    const PackedMatrix w = ops::pack(cpu.ctx, std::span(&source, 1), DType::q4_128);
    constexpr std::int64_t tile_bytes = 16 * 128 / 2 + 16 * 2, tiles = 3;  // 300 inputs are three groups
    CHECK(w.bytes == 4 * tiles * tile_bytes);                              // 37 rows are four strips of 16
    for (std::int64_t row = 0; row < rows; ++row)
      for (std::int64_t c = 0; c < tiles * group_values; ++c) {
        float group[group_values];
        for (std::int64_t i = 0; i < group_values; ++i) group[i] = value(row, c / group_values * group_values + i);
        const Q4Group expected = quantise_q4_128(group);
        const std::byte* tile = w.data.get() + (row / 16 * tiles + c / group_values) * tile_bytes;
        const std::int64_t in_piece = c % 32, at = c % group_values / 32 * 256 + in_piece % 16 / 4 * 64 + row % 16 * 4 + in_piece % 4;
        const auto byte = static_cast<unsigned>(tile[at]);
        CHECK(static_cast<int>(in_piece < 16 ? byte & 15U : byte >> 4U) - 8 == expected.value(c % group_values));
        Half scale;
        std::memcpy(&scale.bits, tile + 1024 + row % 16 * 2, 2);
        CHECK(scale == expected.scale);
      }
  }
  {
    const PackedMatrix w = ops::pack(cpu.ctx, std::span(&source, 1), DType::w8a8);
    constexpr std::int64_t k = 320, strip_bytes = k * 16 + 16 * 4;
    CHECK(w.bytes == 4 * strip_bytes);
    for (std::int64_t row = 0; row < rows; ++row) {
      float largest = 0, scale = 0;
      for (std::int64_t c = 0; c < columns; ++c) largest = std::max(largest, std::abs(value(row, c)));
      const std::byte* strip = w.data.get() + row / 16 * strip_bytes;
      std::memcpy(&scale, strip + k * 16 + row % 16 * 4, 4);
      CHECK(scale == largest / 127.0F);
      for (std::int64_t c = 0; c < k; ++c) {
        const int held = static_cast<int>(strip[c / 4 * 64 + row % 16 * 4 + c % 4]) - 128;
        CHECK(std::abs(static_cast<double>(value(row, c)) - static_cast<double>(scale) * held) <= static_cast<double>(scale) / 2 * (1 + 0x1.0p-15));
      }
    }
  }
}

TEST_CASE("linear: w8a8 sums as many inputs as it takes exactly, and refuses more") {
  // All products are 127 · 127, and the sums of the bytes as they are stored reach 2^31 - 2^24.
  const std::int64_t k = detail::most_row_inputs;
  const auto filled = [](Shape shape, float value) {
    Tensor<float> t(shape);
    for (float& v : t.span()) v = value;
    return t;
  };
  const AnyTensor ones(filled(Shape{2, k}, 1)), more(filled(Shape{1, k + 1}, 1));
  Tensor<float> x = filled(Shape{2, k}, 3);
  for (std::int64_t c = 0; c < k; ++c) x.data()[k + c] = -3;
  for (const Variant& variant : variants(DType::w8a8)) {
    Runner<Cpu> cpu(Cpu(variant.options(1)));
    const PackedMatrix w = ops::pack(cpu.ctx, std::span(&ones, 1), DType::w8a8);
    Tensor<float> y(Shape{2, 2});
    ops::linear(cpu.ctx, matrix(x), w, {}, y.view<2>());
    const double expected = 3 * static_cast<double>(k);
    for (int i = 0; i < 4; ++i)
      CHECK_MESSAGE(std::abs(static_cast<double>(y.data()[i]) - (i < 2 ? expected : -expected)) <= 8 * u32 * expected, label(variant, DType::w8a8), " ", y.data()[i]);
  }
  Runner<Cpu> cpu(Cpu(CpuOptions{.threads = 1}));
  try {
    ops::pack(cpu.ctx, std::span(&more, 1), DType::w8a8);
    FAIL("packed");
  } catch (const OptionError& error) {
    CHECK(std::string(error.what()).find("131073 inputs") != std::string::npos);
    CHECK(std::string(error.what()).find("131072") != std::string::npos);
  }
}

TEST_CASE("pack: blocks stay as they are unless f32 is asked for, or fewer bits; a mix goes to 8 bits, which hold what 4 do") {
  Random random(308);
  constexpr std::int64_t rows = 16, columns = 64;
  Runner<Cpu> cpu(Cpu(CpuOptions{.threads = 1}));
  const AnyTensor q8 = in_blocks(random_tensor<float>(random, Shape{rows, columns}, DType::q8), DType::q8);
  const AnyTensor q4 = in_blocks(random_tensor<float>(random, Shape{rows, columns}, DType::q4), DType::q4);
  const AnyTensor f32(random_tensor<float>(random, Shape{rows, columns}));
  const auto packed = [&](std::initializer_list<AnyTensor> sources, DType asked) { return ops::pack(cpu.ctx, std::span(sources.begin(), sources.size()), asked).format; };
  CHECK(packed({q8}, DType::bf16) == DType::q8);
  CHECK(packed({q4}, DType::bf16) == DType::q4);
  CHECK(packed({q4}, DType::q8) == DType::q4);
  CHECK(packed({q8}, DType::q4) == DType::q4);
  CHECK(packed({q8}, DType::f32) == DType::f32);
  CHECK(packed({q4, q8, q4}, DType::bf16) == DType::q8);
  CHECK(packed({q4, f32}, DType::bf16) == DType::bf16);
  CHECK(packed({q4, f32}, DType::q8) == DType::q8);
  // Bits per weight: q4_128 4.1, q4 4.5, w8a8 8, q8 8.5.
  for (const AnyTensor& source : {q4, q8, f32}) CHECK(packed({source}, DType::q4_128) == DType::q4_128);
  CHECK(packed({q4}, DType::w8a8) == DType::q4);
  CHECK(packed({q8}, DType::w8a8) == DType::w8a8);
  CHECK(packed({q4, q8}, DType::w8a8) == DType::w8a8);
  CHECK(packed({f32, q4}, DType::w8a8) == DType::w8a8);
  const AnyTensor mix[] = {q8, q4};
  const PackedMatrix w = ops::pack(cpu.ctx, std::span<const AnyTensor>(mix), DType::bf16);
  for (std::int64_t row = 0; row < 2 * rows; ++row)
    for (std::int64_t c = 0; c < columns; ++c) {
      const std::byte* tile = w.data.get() + (row / detail::strip_width * 2 + c / block_values) * detail::tile_bytes(DType::q8);
      const double value = static_cast<double>(dequantise(detail::load_from_tile<Q8Block>(tile, row % detail::strip_width), c % block_values));
      CHECK(value == (row < rows ? q8.at(row * columns + c) : q4.at((row - rows) * columns + c)));
    }
}

TEST_CASE("pack: sources in f16 and f64, of rank 4, rounded to the format") {
  Random random(304);
  Tensor<float> values = random_tensor<float>(random, Shape{5, 3 * 2 * 2}, DType::bf16);
  Tensor<Half> half(Shape{5, 3, 2, 2});
  Tensor<double> wide(Shape{5, 3, 2, 2});
  for (std::int64_t i = 0; i < values.elements(); ++i) {
    half.data()[i] = to_half(values.data()[i]);
    wide.data()[i] = static_cast<double>(values.data()[i]);
  }
  const Tensor<float> x = random_tensor<float>(random, Shape{4, 12}, DType::bf16);
  const AnyTensor sources[] = {AnyTensor(std::move(half)), AnyTensor(std::move(wide)), AnyTensor(std::move(values))};
  for (const DType format : weight_formats) {
    Runner<Cpu> cpu(Cpu(CpuOptions{.threads = 1}));
    const PackedMatrix w = ops::pack(cpu.ctx, std::span<const AnyTensor>(sources), format);
    CHECK(w.rows == 15);
    CHECK(w.cols == 12);
    Tensor<float> y(Shape{4, 15});
    ops::linear(cpu.ctx, matrix(x), w, {}, y.view<2>());
    CHECK(same_bits<float>(matrix(y).columns(0, 5), matrix(y).columns(5, 10)));  // exact in f16, f64 and f32 alike
    CHECK(same_bits<float>(matrix(y).columns(0, 5), matrix(y).columns(10, 15)));
  }
}

template <class E, class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const E& error) {
    return error.what();
  } catch (const std::exception& error) {
    return std::string("another exception: ") + error.what();
  }
  return "no exception";
}

TEST_CASE("linear and pack: errors name both sides") {
  Runner<Cpu> cpu(Cpu(CpuOptions{.threads = 1}));
  const AnyTensor a{Tensor<float>(Shape{4, 6})}, b{Tensor<float>(Shape{4, 7})}, c{Tensor<float>(Shape{5, 6})}, vector{Tensor<float>(Shape{6})};
  const PackedMatrix w = ops::pack(cpu.ctx, std::span(&a, 1), DType::f32);
  Tensor<float> x(Shape{2, 5}), x6(Shape{2, 6}), y(Shape{2, 4}), y3(Shape{3, 4});
  const auto contains = [](const std::string& text, std::initializer_list<const char*> pieces) {
    for (const char* piece : pieces)
      CHECK_MESSAGE(text.find(piece) != std::string::npos, "\"", text, "\" lacks ", piece);
  };
  contains(message_of<ShapeError>([&] { ops::linear(cpu.ctx, matrix(x), w, {}, y.view<2>()); }), {"[2, 5]", "6 inputs"});
  contains(message_of<ShapeError>([&] { ops::linear(cpu.ctx, matrix(x6), w, {}, y3.view<2>()); }), {"[3, 4]", "[2, 4]"});
  contains(message_of<ShapeError>([&] {
             ops::linear(cpu.ctx, matrix(x6), w, Epilogue<float>{.bias = nullptr, .activation = Activation::none, .residual = matrix(y3)}, y.view<2>());
           }),
           {"[3, 4]", "[2, 4]"});
  const AnyTensor ab[] = {a, b}, ac[] = {a, c};
  contains(message_of<ShapeError>([&] { ops::pack(cpu.ctx, std::span<const AnyTensor>(ab), DType::f32); }), {"[4, 7]", "[4, 6]"});
  contains(message_of<ShapeError>([&] { ops::pack(cpu.ctx, std::span<const AnyTensor>(ac), DType::f32, true); }), {"same number of rows"});
  contains(message_of<ShapeError>([&] { ops::pack(cpu.ctx, std::span(&vector, 1), DType::f32); }), {"[6]"});
  contains(message_of<OptionError>([&] { ops::pack(cpu.ctx, std::span(&a, 1), DType::i8); }), {"i8", "f32, bf16, q8, q4, q4_128 and w8a8"});
}

}  // namespace

TEST_CASE("a weight without rows keeps its number of inputs") {
  const AnyTensor none(Tensor<float>(Shape{0, 7}));
  Arena arena;
  const auto check = [&](auto backend) {
    Context<decltype(backend)> ctx{backend, arena};
    const PackedMatrix packed = ops::pack(ctx, std::span<const AnyTensor>(&none, 1), DType::f32);
    CHECK(packed.rows == 0);
    CHECK(packed.cols == 7);
  };
  check(Cpu{});
  check(Reference<float>{});
}
