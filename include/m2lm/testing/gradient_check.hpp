// gradient_check: a module's backward pass against exact derivatives of its forward pass.
// Floor: testing. May include: config, core, ops, backends, layers, parts, io, sampling, models, train.
#pragma once

#include <m2lm/backends/reference/reference.hpp>
#include <m2lm/core/dual.hpp>
#include <m2lm/core/gradients.hpp>
#include <m2lm/core/rng.hpp>
#include <m2lm/testing/tolerance.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>
#include <utility>
#include <vector>

namespace m2lm::testing {

struct GradientCheckOptions {
  std::uint64_t seed = 1;
  int directions = 3;             ///< random directions for each tensor
  std::int64_t coordinates = 24;  ///< single elements of each tensor: all of them if there are no more, else as many at random
  double input_scale = 1;         ///< inputs have this standard deviation
};

/// What gradient_check found. `worst` is the comparison with the largest error relative to its bound.
struct GradientReport {
  bool passed = true;
  std::int64_t comparisons = 0;
  std::string worst_tensor;  ///< "input", a parameter's name, or what else went wrong
  double error = 0, bound = 0;
  double expected = 0, got = 0;  ///< of the worst: derivative of the forward pass, and what backward says

  std::string string() const {
    char numbers[200];
    std::snprintf(numbers, sizeof numbers, ": the forward pass says %.17g, backward %.17g (error %.3g, bound %.3g; %lld comparisons)", expected, got, error,
                  bound, static_cast<long long>(comparisons));
    return (passed ? "gradients agree, worst " : "gradients differ at ") + worst_tensor + numbers;
  }
};

namespace detail {

/// A module on one backend with what it needs to run.
template <class T, class Make>
struct Differentiated {
  using B = Reference<T>;
  using Module = decltype(std::declval<const Make&>().template operator()<B>());
  B backend;
  Arena arena, tape;
  Context<B> ctx{backend, arena};
  Module module;

  explicit Differentiated(const Make& make) : module(make.template operator()<B>()) {}
  void prepare() {
    if constexpr (requires { module.prepare(ctx, DType::native); })
      module.prepare(ctx, DType::native);
    else if constexpr (requires { module.prepare(ctx); })
      module.prepare(ctx);
  }
};

inline double symmetric(Rng& rng) { return std::sqrt(12.0) * (rng.uniform() - 0.5); }  // mean 0, variance 1

}  // namespace detail

/// Compares `backward` on Reference<double> with exact directional derivatives of `forward`, from dual numbers, for the input and
/// for every parameter: along random directions and single elements. All values are random.
///
/// `make` is called as make.operator()<B>() with B = Reference<double> and Reference<Dual<double>> and returns the module. Of the
/// module is asked: `fields`; `prepare(ctx, DType)` or `prepare(ctx)`; `struct Saved`; `forward(ctx, x, y, Saved*)` and
/// `backward(ctx, dy, saved, gradients, dx)`, with x [input], y [output]. A layer whose functions look different is wrapped in a
/// struct that has these. An input without elements is not differentiated.
///
/// Also checked: forward gives the same with and without Saved; backward adds to gradients and overwrites dx; a frozen parameter
/// or an unwanted dx changes no other gradient.
///
/// A derivative here is a sum of products that themselves are sums: its rounding error is below eps · n · Σ|terms|, where n, the
/// number of values that meet in it, is at most all of the module's. Terms that cancel may be as large as the largest gradient.
template <class Make>
GradientReport gradient_check(const Make& make, Shape input, Shape output, const GradientCheckOptions& options = {}) {
  require(input.rank() == 2 && output.rank() == 2, "m2lm::testing::gradient_check: inputs and outputs are matrices, not ", input.string(), " and ",
          output.string());
  using Plain = detail::Differentiated<double, Make>;
  using Exact = detail::Differentiated<Dual<double>, Make>;
  Rng rng(options.seed);
  GradientReport report;
  double worst = -1;
  const auto compare = [&](const std::string& tensor, double expected, double got, double bound) {
    ++report.comparisons;
    const double error = std::abs(expected - got);
    const double ratio = error == 0 ? 0 : bound > 0 && std::isfinite(error) ? error / bound : std::numeric_limits<double>::infinity();
    report.passed = report.passed && ratio <= 1;
    if (ratio <= worst) return;
    worst = ratio;
    report.worst_tensor = tensor;
    report.error = error;
    report.bound = bound;
    report.expected = expected;
    report.got = got;
  };

  // Values: parameters shared by both modules, an input, a gradient of the output.
  Plain plain(make);
  plain.ctx.tape = &plain.tape;
  std::vector<std::string> names;
  std::vector<Tensor<double>> values;
  std::int64_t everything = input.elements() + output.elements();
  for_each_parameter(
      [&](std::string_view name, Parameter& p) {
        Tensor<double> t(p.shape);
        const double inputs = p.shape.rank() < 2 || p.shape[0] == 0 ? 1.0 : static_cast<double>(t.elements() / p.shape[0]);
        for (double& v : t.span()) v = detail::symmetric(rng) / std::sqrt(std::max(inputs, 1.0));
        p.value = AnyTensor(t.clone());
        names.emplace_back(name);
        everything += t.elements();
        values.push_back(std::move(t));
      },
      plain.module);
  plain.prepare();
  Tensor<double> x(input), y(output), dy(output), dx(input);
  for (double& v : x.span()) v = options.input_scale * detail::symmetric(rng);
  for (double& v : dy.span()) v = detail::symmetric(rng);

  // Gradients. They start at 1: a backward pass adds.
  typename Plain::Module::Saved saved{};
  const auto run = [&](Gradients<double>& gradients, Matrix<double> wanted) {
    const Arena::Scope scope(plain.tape);
    plain.module.forward(plain.ctx, Matrix<const double>(x.view<2>()), y.view<2>(), &saved);
    for (auto& e : gradients.entries()) std::fill_n(e.value.data(), e.value.elements(), 1.0);
    plain.module.backward(plain.ctx, Matrix<const double>(dy.view<2>()), saved, gradients, wanted);
  };
  const bool has_input = input.elements() > 0;
  Gradients<double> gradients(plain.module);
  for (double& v : dx.span()) v = 7;
  run(gradients, has_input ? dx.view<2>() : Matrix<double>{});
  std::vector<Tensor<double>> got;  // in the order of names
  double largest = 1;               // the ones that gradients started at are among the terms
  for (auto& e : gradients.entries()) {
    got.push_back(e.value.clone());
    for (double& v : got.back().span()) largest = std::max(largest, std::abs(v -= 1.0));
  }
  for (const double v : dx.span()) largest = std::max(largest, std::abs(v));
  const double unit = epsilon_f64 * static_cast<double>(everything + 64);

  {
    Tensor<double> alone(output);
    plain.module.forward(plain.ctx, Matrix<const double>(x.view<2>()), alone.view<2>(), nullptr);
    double size = 1;
    for (const double v : y.span()) size = std::max(size, std::abs(v));
    for (std::int64_t i = 0; i < y.elements(); ++i) compare("the output with and without Saved", alone.data()[i], y.data()[i], unit * size);
  }
  // Half of the parameters frozen, and the other half, and no dx.
  for (std::size_t half = 0; half < 2 && !names.empty(); ++half) {
    std::size_t index = 0;
    Gradients<double> some;
    some.add(plain.module, [&](std::string_view) { return index++ % 2 == half; });
    Tensor<double> same(input);
    run(some, has_input && half == 0 ? same.view<2>() : Matrix<double>{});
    if (half == 0)
      for (std::int64_t i = 0; i < x.elements(); ++i) compare("input, while parameters are frozen", dx.data()[i], same.data()[i], 0);
    for (const auto& e : some.entries()) {
      const auto at = static_cast<std::size_t>(std::find(names.begin(), names.end(), e.name) - names.begin());
      for (std::int64_t i = 0; i < e.value.elements(); ++i)
        compare(e.name + ", while others are frozen", got[at].data()[i], e.value.data()[i] - 1.0, 0);
    }
  }

  // Derivatives: one forward pass with dual numbers for each direction.
  Exact exact(make);
  const auto derivative = [&](std::size_t which, const std::vector<double>& direction) {
    using D = Dual<double>;
    const auto with_tangent = [&](const Tensor<double>& t, bool chosen) {
      Tensor<D> out(t.shape());
      for (std::int64_t i = 0; i < t.elements(); ++i) out.data()[i] = D(t.data()[i], chosen ? direction[static_cast<std::size_t>(i)] : 0.0);
      return out;
    };
    std::size_t index = 0;
    for_each_parameter(
        [&](std::string_view, Parameter& p) {
          p.value = AnyTensor(with_tangent(values[index], index == which));
          ++index;
        },
        exact.module);
    exact.prepare();
    const Tensor<D> in = with_tangent(x, which == names.size());
    Tensor<D> out(output);
    exact.module.forward(exact.ctx, in.template view<2>(), out.template view<2>(), nullptr);
    double sum = 0, size = 0;
    for (std::int64_t i = 0; i < out.elements(); ++i) {
      sum += dy.data()[i] * out.data()[i].tangent;
      size += std::abs(dy.data()[i] * out.data()[i].tangent);
    }
    return std::pair(sum, size);
  };
  for (std::size_t which = 0; which < names.size() + (has_input ? 1 : 0); ++which) {
    const Tensor<double>& gradient = which < names.size() ? got[which] : dx;
    const std::string name = which < names.size() ? names[which] : "input";
    const auto n = static_cast<std::size_t>(gradient.elements());
    if (n == 0) continue;
    std::vector<double> direction(n);
    const auto check = [&](const std::string& label) {
      double sum = 0, size = 0;
      for (std::size_t i = 0; i < n; ++i) {
        sum += gradient.data()[i] * direction[i];
        size += std::abs(gradient.data()[i] * direction[i]);
      }
      const auto [expected, expected_size] = derivative(which, direction);
      compare(label, expected, sum, unit * (size + expected_size + largest));
    };
    for (int i = 0; i < options.directions; ++i) {
      for (double& d : direction) d = detail::symmetric(rng);
      check(name);
    }
    std::fill(direction.begin(), direction.end(), 0.0);
    const auto count = std::min(static_cast<std::int64_t>(n), options.coordinates);
    for (std::int64_t i = 0; i < count; ++i) {
      const auto at = count == static_cast<std::int64_t>(n) ? static_cast<std::size_t>(i) : static_cast<std::size_t>(rng.next() % n);
      direction[at] = 1;
      check(concat(name, "[", at, "]"));
      direction[at] = 0;
    }
  }
  return report;
}

}  // namespace m2lm::testing
