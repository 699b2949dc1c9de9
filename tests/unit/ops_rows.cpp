// The ops that work row by row: rms_norm, layer_norm, rope, gather_rows, patchify, add_rows. Cpu at every level, and
// Reference<float>, against Reference<double>. Bounds with u = 2^-24 and rows of n elements:
//   rms_norm    squares are positive, so their sum has relative error (n + 2)·u, its root half of that; then a division, two
//               products and sqrt: |δy| ≤ ((n + 2)/2 + 6)·u·|y|
//   layer_norm  |δmean| ≤ (n + 1)·u·mean|x| =: e. The sum of (x - mean')² exceeds n·variance by n·e² and has relative error
//               (n + 4)·u: R = ((n + 8)·u + e²/(variance + eps))/2 + 4·u of the factor; c = x - mean' carries e + u·|c|:
//               |δy| ≤ |w|·f·(e + (R + 4·u)·(|c| + e)) + 2·u·|y|, f = 1/sqrt(variance + eps)
//   rope        two products and a sum: 3·u·(|a·cos| + |b·sin|)
//   gather_rows, patchify, add_rows: exact, or one rounding: equal to the same in f32
#include <doctest/doctest.h>

#include <m2lm/core.hpp>

#include "ops_support.hpp"

namespace {

using namespace m2lm_test;

template <class F>
void for_each_level(F&& f) {
  for (const IsaLevel level : levels()) {
    Runner<Cpu> cpu(Cpu(CpuOptions{.threads = 2, .max_isa = level}));
    f(cpu, std::string(isa_name(level)));
  }
}
template <class F>
void for_each_backend(F&& f) {
  for_each_level(f);
  Runner<Reference<float>> reference;
  f(reference, std::string("Reference<float>"));
}

template <class T>
Vector<const T> vector(const Tensor<T>& t) {
  return t.template view<1>();
}

struct Norm {
  std::int64_t m, n;
  double eps, mean;
  std::int64_t extra;
  std::string string() const { return concat("m=", m, " n=", n, " eps=", eps, " mean=", mean, " extra=", extra); }
};

std::vector<Norm> norms(std::uint64_t seed) {
  Random random(seed);
  std::vector<Norm> out{{0, 5, 1e-5, 0, 0}, {3, 1, 1e-5, 0, 0}, {2, 4097, 1e-6, 0, 1}, {300, 129, 1e-5, 3, 0}, {2, 0, 1e-5, 0, 0}};
  for (int i = 0; i < 40; ++i)
    out.push_back({random.size(13), random.size(300), random.coin() ? 1e-5 : 1e-6, random.coin() ? 0.0 : 2.0, random.coin() ? random.integer(1, 9) : 0});
  return out;
}

TEST_CASE("rms_norm") {
  std::uint64_t seed = 6000;
  for (const Norm& p : norms(601)) {
    Random random(++seed);
    Tensor<float> x = random_tensor<float>(random, Shape{p.m, p.n});
    const Tensor<float> w = random_tensor<float>(random, Shape{p.n});
    const Tensor<double> xd = converted<double>(x), wd = converted<double>(w);
    Tensor<double> yd(x.shape());
    Runner<Reference<double>> reference;
    ops::rms_norm(reference.ctx, matrix(xd), vector(wd), p.eps, yd.view<2>());
    for_each_backend([&](auto& runner, const std::string& name) {
      Strided<float> in(x, p.extra, -55.0F), out(p.m, p.n, p.extra, -77.0F);
      ops::rms_norm(runner.ctx, Matrix<const float>(in.view()), vector(w), p.eps, out.view());
      Worst worst;
      for (std::int64_t i = 0; i < p.m; ++i)
        for (std::int64_t j = 0; j < p.n; ++j) {
          const double expected = yd.data()[i * p.n + j];
          worst.add(static_cast<double>(out.view()(i, j)), expected, (static_cast<double>(p.n + 2) / 2 + 6) * u32 * std::abs(expected), i, j);
        }
      CHECK_MESSAGE(worst.passed(), name, " ", p.string(), " at ", worst.where());
      CHECK(out.gaps_untouched());
      ops::rms_norm(runner.ctx, Matrix<const float>(in.view()), vector(w), p.eps, in.view());  // in place
      CHECK_MESSAGE(same_bits<float>(in.view(), out.view()), name, " ", p.string(), " in place");
      CHECK(in.gaps_untouched());
    });
  }
}

TEST_CASE("layer_norm") {
  std::uint64_t seed = 7000;
  for (const Norm& p : norms(602)) {
    Random random(++seed);
    Tensor<float> x = random_tensor<float>(random, Shape{p.m, p.n});
    for (float& v : x.span()) v += static_cast<float>(p.mean);
    const Tensor<float> w = random_tensor<float>(random, Shape{p.n}), b = random_tensor<float>(random, Shape{p.n});
    const Tensor<double> xd = converted<double>(x), wd = converted<double>(w), bd = converted<double>(b);
    Tensor<double> yd(x.shape()), bound(x.shape());
    Runner<Reference<double>> reference;
    ops::layer_norm(reference.ctx, matrix(xd), vector(wd), vector(bd), p.eps, yd.view<2>());
    const double n = static_cast<double>(p.n);
    for (std::int64_t i = 0; i < p.m; ++i) {
      double mean = 0, size = 0, variance = 0;
      for (std::int64_t j = 0; j < p.n; ++j) mean += xd.data()[i * p.n + j] / n;
      for (std::int64_t j = 0; j < p.n; ++j) size += std::abs(xd.data()[i * p.n + j]) / n;
      for (std::int64_t j = 0; j < p.n; ++j) variance += std::pow(xd.data()[i * p.n + j] - mean, 2) / n;
      const double e = (n + 1) * u32 * size, factor = 1 / std::sqrt(variance + p.eps);
      const double relative = ((n + 8) * u32 + e * e * factor * factor) / 2 + 4 * u32;
      for (std::int64_t j = 0; j < p.n; ++j) {
        const double c = std::abs(xd.data()[i * p.n + j] - mean);
        bound.data()[i * p.n + j] =
            std::abs(wd.data()[j]) * factor * (e + (relative + 4 * u32) * (c + e)) + 2 * u32 * std::abs(yd.data()[i * p.n + j]);
      }
    }
    for_each_backend([&](auto& runner, const std::string& name) {
      Strided<float> in(x, p.extra, -55.0F), out(p.m, p.n, p.extra, -77.0F);
      ops::layer_norm(runner.ctx, Matrix<const float>(in.view()), vector(w), vector(b), p.eps, out.view());
      Worst worst;
      for (std::int64_t i = 0; i < p.m; ++i)
        for (std::int64_t j = 0; j < p.n; ++j)
          worst.add(static_cast<double>(out.view()(i, j)), yd.data()[i * p.n + j], bound.data()[i * p.n + j], i, j);
      CHECK_MESSAGE(worst.passed(), name, " ", p.string(), " at ", worst.where());
      CHECK(out.gaps_untouched());
      ops::layer_norm(runner.ctx, Matrix<const float>(in.view()), vector(w), vector(b), p.eps, in.view());
      CHECK_MESSAGE(same_bits<float>(in.view(), out.view()), name, " ", p.string(), " in place");
      CHECK(in.gaps_untouched());
    });
  }
}

TEST_CASE("rope") {
  Random random(603);
  for (int trial = 0; trial < 40; ++trial) {
    const std::int64_t tokens = trial == 0 ? 0 : trial == 1 ? 300 : random.size(17), heads = random.integer(1, 5);
    const std::int64_t half = trial == 2 ? 1 : random.size(65), extra = random.coin() ? random.integer(1, 9) : 0, d = 2 * half;
    const Tensor<float> x = random_tensor<float>(random, Shape{tokens, heads * d});
    Tensor<float> cos(Shape{tokens, half}), sin(cos.shape());
    for (std::int64_t i = 0; i < cos.elements(); ++i) {
      const double angle = static_cast<double>(random.value()) * 10;
      cos.data()[i] = static_cast<float>(std::cos(angle));
      sin.data()[i] = static_cast<float>(std::sin(angle));
    }
    Tensor<double> yd = converted<double>(x);
    const Tensor<double> cd = converted<double>(cos), sd = converted<double>(sin);
    Runner<Reference<double>> reference;
    ops::rope(reference.ctx, yd.view<2>(), d, matrix(cd), matrix(sd));
    for_each_backend([&](auto& runner, const std::string& name) {
      Strided<float> y(x, extra, -77.0F);
      ops::rope(runner.ctx, y.view(), d, matrix(cos), matrix(sin));
      Worst worst;
      for (std::int64_t t = 0; t < tokens; ++t)
        for (std::int64_t j = 0; j < heads * d; ++j) {
          const std::int64_t i = j % half, partner = j % d < half ? j + half : j - half;
          const double bound = 3 * u32 * (std::abs(static_cast<double>(x.data()[t * heads * d + j]) * cd.data()[t * half + i]) +
                                          std::abs(static_cast<double>(x.data()[t * heads * d + partner]) * sd.data()[t * half + i]));
          worst.add(static_cast<double>(y.view()(t, j)), yd.data()[t * heads * d + j], bound, t, j);
        }
      CHECK_MESSAGE(worst.passed(), name, " tokens=", tokens, " heads=", heads, " head_dim=", d, " at ", worst.where());
      CHECK(y.gaps_untouched());
    });
  }
}

TEST_CASE("rope turns (1, 0) by the angle, in the halves layout") {
  for_each_backend([](auto& runner, const std::string& name) {
    Tensor<float> x(Shape{1, 4}), cos(Shape{1, 2}), sin(Shape{1, 2});
    x.data()[0] = 1;  // pairs are (0, 2) and (1, 3)
    cos.data()[0] = 0.6F;
    sin.data()[0] = 0.8F;
    cos.data()[1] = 1;
    ops::rope(runner.ctx, x.view<2>(), 4, matrix(cos), matrix(sin));
    CHECK_MESSAGE(x.data()[0] == 0.6F, name);
    CHECK_MESSAGE(x.data()[1] == 0.0F, name);
    CHECK_MESSAGE(x.data()[2] == 0.8F, name);
    CHECK_MESSAGE(x.data()[3] == 0.0F, name);
  });
}

TEST_CASE("add_rows is one f32 addition per element") {
  Random random(604);
  for (int trial = 0; trial < 40; ++trial) {
    const std::int64_t m = trial == 0 ? 0 : trial == 1 ? 400 : random.size(17), n = trial == 2 ? 0 : random.size(129), extra = random.coin() ? 3 : 0;
    const Tensor<float> x = random_tensor<float>(random, Shape{m, n}), a = random_tensor<float>(random, Shape{m, n});
    Tensor<float> expected(Shape{m, n});
    for (std::int64_t i = 0; i < m * n; ++i) expected.data()[i] = x.data()[i] + a.data()[i];
    for_each_backend([&](auto& runner, const std::string& name) {
      Strided<float> y(x, extra, -77.0F), addend(a, extra + 1, -55.0F);
      ops::add_rows(runner.ctx, y.view(), Matrix<const float>(addend.view()));
      CHECK_MESSAGE(same_bits<float>(y.view(), matrix(expected)), name, " m=", m, " n=", n);
      CHECK(y.gaps_untouched());
    });
  }
}

TEST_CASE("gather_rows, from every dtype") {
  Random random(605);
  const std::int64_t rows = 11, n = 37;
  const Tensor<float> values = random_tensor<float>(random, Shape{rows, n}, DType::bf16);
  Tensor<Bf16> bf16(values.shape());
  Tensor<Half> half(values.shape());
  for (std::int64_t i = 0; i < values.elements(); ++i) {
    bf16.data()[i] = to_bf16(values.data()[i]);
    half.data()[i] = to_half(values.data()[i]);
  }
  const AnyTensor tables[] = {AnyTensor(values.clone()), AnyTensor(std::move(bf16)), AnyTensor(std::move(half)), AnyTensor(converted<double>(values))};
  const std::vector<std::int32_t> ids{10, 0, 3, 3, 7};
  for (const AnyTensor& table : tables)
    for_each_backend([&](auto& runner, const std::string& name) {
      Strided<float> y(static_cast<std::int64_t>(ids.size()), n, 5, -77.0F);
      ops::gather_rows(runner.ctx, table, std::span(ids), y.view());
      for (std::size_t i = 0; i < ids.size(); ++i)
        for (std::int64_t j = 0; j < n; ++j) {
          const std::int64_t at = ids[i] * n + j;
          const float want = table.dtype() == DType::f16 ? to_float(to_half(values.data()[at])) : values.data()[at];
          if (y.view()(static_cast<std::int64_t>(i), j) != want) FAIL_CHECK(name << " " << std::string(dtype_name(table.dtype())) << " row " << i);
        }
      CHECK(y.gaps_untouched());
      Tensor<float> none(Shape{0, n});
      CHECK_NOTHROW(ops::gather_rows(runner.ctx, table, {}, none.template view<2>()));
    });
  Runner<Cpu> cpu(Cpu(CpuOptions{.threads = 1}));
  Tensor<float> y(Shape{1, n});
  for (const std::int32_t id : {-1, 11}) {
    const std::int32_t bad[] = {id};
    CHECK_THROWS_WITH_AS(ops::gather_rows(cpu.ctx, tables[0], bad, y.view<2>()),
                         concat("m2lm: token id ", id, " is outside the embedding table of 11 rows").c_str(), InputError);
  }
}

TEST_CASE("patchify lays out patches as the weight of a convolution") {
  struct Case {
    std::int64_t channels, rows, columns, patch;
  };
  for (const Case& c : {Case{3, 2, 3, 4}, Case{1, 1, 1, 1}, Case{3, 5, 7, 1}, Case{2, 1, 4, 14}, Case{4, 3, 1, 7}}) {
    // Rows and columns that do not fill a patch are left out; the picture is cut from a larger one: strides in all dimensions.
    const std::int64_t h = c.rows * c.patch + c.patch - 1, w = c.columns * c.patch + c.patch / 2, n = c.channels * c.patch * c.patch;
    Tensor<float> buffer(Shape{c.channels, h + 2, w + 3});
    for (std::int64_t i = 0; i < buffer.elements(); ++i) buffer.data()[i] = static_cast<float>(i);
    const View<const float, 3> pixels(buffer.data(), {c.channels, h, w}, {(h + 2) * (w + 3), w + 3, 1});
    for_each_backend([&](auto& runner, const std::string& name) {
      Strided<float> y(c.rows * c.columns, n, 3, -77.0F);
      ops::patchify(runner.ctx, pixels, c.patch, y.view());
      std::int64_t wrong = 0;
      for (std::int64_t row = 0; row < c.rows; ++row)
        for (std::int64_t column = 0; column < c.columns; ++column)
          for (std::int64_t channel = 0; channel < c.channels; ++channel)
            for (std::int64_t i = 0; i < c.patch; ++i)
              for (std::int64_t j = 0; j < c.patch; ++j)
                wrong += y.view()(row * c.columns + column, (channel * c.patch + i) * c.patch + j) !=
                         pixels(channel, row * c.patch + i, column * c.patch + j);
      CHECK_MESSAGE(wrong == 0, name, " patch=", c.patch);
      CHECK(y.gaps_untouched());
    });
  }
  Runner<Cpu> cpu(Cpu(CpuOptions{.threads = 1}));
  const Tensor<float> pixels(Shape{3, 10, 8});
  Tensor<float> y(Shape{6, 48});
  CHECK_THROWS_WITH_AS(ops::patchify(cpu.ctx, pixels.view<3>(), 0, y.view<2>()), "m2lm::ops::patchify: patch = 0", ShapeError);
  CHECK_THROWS_AS(ops::patchify(cpu.ctx, pixels.view<3>(), 4, y.view<2>()), ShapeError);
}

TEST_CASE("a row has the same bits alone and in a batch, on any number of threads") {
  Random random(606);
  const std::int64_t m = 301, n = 129;  // enough elements for the threads to be used
  const Tensor<float> x = random_tensor<float>(random, Shape{m, n}), w = random_tensor<float>(random, Shape{n}), b = random_tensor<float>(random, Shape{n});
  for (const IsaLevel level : levels()) {
    Tensor<float> rms(Shape{m, n}), layer(Shape{m, n});
    for (const int threads : {1, 2, 3}) {
      Runner<Cpu> cpu(Cpu(CpuOptions{.threads = threads, .max_isa = level}));
      Tensor<float> y(Shape{m, n}), alone(Shape{m, n});
      const auto same = [&](Tensor<float>& first, auto&& op) {
        op(matrix(x), y.view<2>());
        if (threads == 1) first = y.clone();
        for (std::int64_t i = 0; i < m; ++i) op(matrix(x).rows(i, i + 1), alone.view<2>().rows(i, i + 1));
        return same_bits(matrix(y), matrix(first)) && same_bits(matrix(alone), matrix(first));
      };
      CHECK_MESSAGE(same(rms, [&](auto in, auto out) { ops::rms_norm(cpu.ctx, in, vector(w), 1e-5, out); }), isa_name(level), " rms_norm");
      CHECK_MESSAGE(same(layer, [&](auto in, auto out) { ops::layer_norm(cpu.ctx, in, vector(w), vector(b), 1e-5, out); }), isa_name(level), " layer_norm");
    }
  }
}

TEST_CASE("errors name both sides") {
  Runner<Cpu> cpu(Cpu(CpuOptions{.threads = 1}));
  const Tensor<float> x(Shape{2, 6}), w(Shape{5}), c(Shape{3, 2});
  Tensor<float> y(Shape{2, 6}), z(Shape{3, 6});
  CHECK_THROWS_WITH_AS(ops::rms_norm(cpu.ctx, matrix(x), vector(w), 1e-5, y.view<2>()), "m2lm::ops::rms_norm: weight has 5 elements, x is [2, 6]", ShapeError);
  CHECK_THROWS_WITH_AS(ops::layer_norm(cpu.ctx, matrix(x), vector(w), vector(w), 1e-5, z.view<2>()), "m2lm::ops::layer_norm: x is [2, 6], y is [3, 6]", ShapeError);
  CHECK_THROWS_WITH_AS(ops::rope(cpu.ctx, y.view<2>(), 3, matrix(c), matrix(c)), "m2lm::ops::rope: head_dim = 3 is not even", ShapeError);
  CHECK_THROWS_WITH_AS(ops::rope(cpu.ctx, y.view<2>(), 4, matrix(c), matrix(c)), "m2lm::ops::rope: x is [2, 6], head_dim 4", ShapeError);
  CHECK_THROWS_WITH_AS(ops::rope(cpu.ctx, y.view<2>(), 2, matrix(c), matrix(c)), "m2lm::ops::rope: cos is [3, 2], expected [2, 1]", ShapeError);
  CHECK_THROWS_WITH_AS(ops::add_rows(cpu.ctx, y.view<2>(), matrix(c)), "m2lm::ops::add_rows: x is [2, 6], the addend [3, 2]", ShapeError);
}

}  // namespace
