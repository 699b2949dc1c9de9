// gradient_check: a module's backward pass against exact derivatives of its forward pass, and one backend against another.
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

namespace m2lm::inline M2LM_ABI::testing {

/// How much gradient_check tries, and with what numbers.
struct GradientCheckOptions {
  std::uint64_t seed = 1;         ///< of inputs, values, directions and coordinates
  int directions = 3;             ///< random directions for each tensor
  std::int64_t coordinates = 24;  ///< single elements of each tensor: all of them if there are no more, else as many at random
  double input_scale = 1;         ///< inputs have this standard deviation
};

/// What gradient_check found. `worst` is the comparison with the largest error relative to its bound.
struct GradientReport {
  bool passed = true;            ///< every error is within its bound
  std::int64_t comparisons = 0;  ///< directions and coordinates that were tried
  std::string worst_tensor;      ///< "input", a parameter's name, or what else went wrong
  double error = 0;              ///< of the worst: |got - expected|
  double bound = 0;              ///< of the worst: what rounding explains
  double expected = 0;           ///< of the worst: the derivative
  double got = 0;                ///< of the worst: what backward gives

  /// The verdict and the worst comparison in one line.
  std::string string() const {
    char numbers[200];
    std::snprintf(numbers, sizeof numbers, ": %.17g expected, backward gives %.17g (error %.3g, bound %.3g; %lld comparisons)", expected, got, error,
                  bound, static_cast<long long>(comparisons));
    return (passed ? "gradients agree, worst " : "gradients differ at ") + worst_tensor + numbers;
  }
};

namespace detail {

/// A module on one backend with what it needs to run.
template <class B, class Make>
struct Differentiated {
  using S = ScalarOf<B>;
  using Module = decltype(std::declval<const Make&>().template operator()<B>());
  B backend;
  Arena arena, tape;
  Context<B> ctx{backend, arena};
  Module module;
  typename Module::Saved saved{};

  explicit Differentiated(const Make& make, B b = {}) : backend(std::move(b)), module(make.template operator()<B>()) {}
  void prepare(DType format) {
    if constexpr (requires { module.prepare(ctx, format); })
      module.prepare(ctx, format);
    else if constexpr (requires { module.prepare(ctx); })
      module.prepare(ctx);
  }
  /// y, dx unless it is empty, and gradients, which start at 1: a backward pass adds.
  void run(const Tensor<S>& x, const Tensor<S>& dy, Tensor<S>& y, Gradients<S>& gradients, Matrix<S> dx) {
    const Arena::Scope scope(tape);
    module.forward(ctx, x.template view<2>(), y.template view<2>(), &saved);
    for (auto& e : gradients.entries()) std::fill_n(e.value.data(), e.value.elements(), S(1));
    module.backward(ctx, dy.template view<2>(), saved, gradients, dx);
  }
};

inline double symmetric(Rng& rng) { return std::sqrt(12.0) * (rng.uniform() - 0.5); }  // mean 0, variance 1

/// Random values of a parameter, such that a product keeps the size of its input.
template <class S>
Tensor<S> random_values(const Shape& shape, Rng& rng) {
  Tensor<S> t(shape);
  const double inputs = shape.rank() < 2 || shape[0] == 0 ? 1.0 : static_cast<double>(t.elements() / shape[0]);
  for (S& v : t.span()) v = static_cast<S>(symmetric(rng) / std::sqrt(std::max(inputs, 1.0)));
  return t;
}

/// Keeps the worst of many comparisons.
class Comparisons {
  GradientReport report_;
  double worst_ = -1;

 public:
  void add(const std::string& tensor, double expected, double got, double bound) {
    ++report_.comparisons;
    const double error = std::abs(expected - got);
    const double ratio = error == 0 ? 0 : bound > 0 && std::isfinite(error) ? error / bound : std::numeric_limits<double>::infinity();
    report_.passed = report_.passed && ratio <= 1;
    if (ratio <= worst_) return;
    worst_ = ratio;
    report_.worst_tensor = tensor;
    report_.error = error;
    report_.bound = bound;
    report_.expected = expected;
    report_.got = got;
  }
  const GradientReport& report() const { return report_; }
};

}  // namespace detail

/// Compares `backward` on Reference<double> with exact directional derivatives of `forward`, from dual numbers, for the input and
/// for every parameter: along random directions and single elements. All values are random.
///
/// `make` is called as `make.operator()<B>()` with B = `Reference<double>` and `Reference<Dual<double>>` and returns the module. Of the
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
  using Plain = detail::Differentiated<Reference<double>, Make>;
  using Exact = detail::Differentiated<Reference<Dual<double>>, Make>;
  Rng rng(options.seed);
  detail::Comparisons comparisons;
  const auto compare = [&](const std::string& tensor, double expected, double got, double bound) { comparisons.add(tensor, expected, got, bound); };

  // Values: parameters shared by both modules, an input, a gradient of the output.
  Plain plain(make);
  plain.ctx.tape = &plain.tape;
  std::vector<std::string> names;
  std::vector<Tensor<double>> values;
  std::int64_t everything = input.elements() + output.elements();
  for_each_parameter(
      [&](std::string_view name, Parameter& p) {
        Tensor<double> t = detail::random_values<double>(p.shape, rng);
        p.value = AnyTensor(t.clone());
        names.emplace_back(name);
        everything += t.elements();
        values.push_back(std::move(t));
      },
      plain.module);
  plain.prepare(DType::native);
  Tensor<double> x(input), y(output), dy(output), dx(input);
  for (double& v : x.span()) v = options.input_scale * detail::symmetric(rng);
  for (double& v : dy.span()) v = detail::symmetric(rng);

  const auto run = [&](Gradients<double>& gradients, Matrix<double> wanted) { plain.run(x, dy, y, gradients, wanted); };
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
    exact.prepare(DType::native);
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
  return comparisons.report();
}

/// Compares `backward` on another backend with that on Reference<double>, which gradient_check has judged: `make` and the module as
/// there, on B and on Reference<double>; weights are packed in `format`. All values are random, of B's scalar. An element may differ by
/// `tolerance` times the largest gradient of the module (network_tolerance says what rounding explains).
template <class B, class Make>
GradientReport compare_gradients(B backend, const Make& make, Shape input, Shape output, double tolerance, DType format = DType::f32,
                                 const GradientCheckOptions& options = {}) {
  using S = ScalarOf<B>;
  detail::Differentiated<B, Make> tested(make, std::move(backend));
  detail::Differentiated<Reference<double>, Make> judge(make);
  tested.ctx.tape = &tested.tape;
  judge.ctx.tape = &judge.tape;
  Rng rng(options.seed);
  std::vector<AnyTensor> values;
  for_each_parameter(
      [&](std::string_view, Parameter& p) {
        p.value = AnyTensor(detail::random_values<S>(p.shape, rng));
        values.push_back(p.value);
      },
      tested.module);
  std::size_t index = 0;
  for_each_parameter([&](std::string_view, Parameter& p) { p.value = values[index++]; }, judge.module);
  tested.prepare(format);
  judge.prepare(DType::native);
  Tensor<S> x(input), y(output), dy(output), dx(input);
  for (S& v : x.span()) v = static_cast<S>(options.input_scale * detail::symmetric(rng));
  for (S& v : dy.span()) v = static_cast<S>(detail::symmetric(rng));
  const auto exact = [](const Tensor<S>& t) {
    Tensor<double> out(t.shape());
    std::copy_n(t.data(), t.elements(), out.data());
    return out;
  };
  Tensor<double> judged_y(output), judged_dx(input);
  Gradients<S> gradients(tested.module);
  Gradients<double> judged(judge.module);
  const bool has_input = input.elements() > 0;
  tested.run(x, dy, y, gradients, has_input ? dx.template view<2>() : Matrix<S>{});
  judge.run(exact(x), exact(dy), judged_y, judged, has_input ? judged_dx.view<2>() : Matrix<double>{});

  double largest = 1, largest_output = 1;  // gradients started at 1
  for (const auto& e : judged.entries())
    for (const double v : e.value.span()) largest = std::max(largest, std::abs(v));
  for (const double v : judged_dx.span()) largest = std::max(largest, std::abs(v));
  for (const double v : judged_y.span()) largest_output = std::max(largest_output, std::abs(v));
  detail::Comparisons comparisons;
  const auto compare = [&](const std::string& name, const Tensor<double>& expected, const Tensor<S>& got, double size) {
    for (std::int64_t i = 0; i < expected.elements(); ++i)
      comparisons.add(concat(name, "[", i, "]"), expected.data()[i], static_cast<double>(got.data()[i]), tolerance * size);
  };
  compare("output", judged_y, y, largest_output);
  compare("input", judged_dx, dx, largest);
  for (std::size_t i = 0; i < judged.entries().size(); ++i) compare(judged.entries()[i].name, judged.entries()[i].value, gradients.entries()[i].value, largest);
  return comparisons.report();
}

}  // namespace m2lm::testing
