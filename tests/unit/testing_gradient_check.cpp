// gradient_check finds what can be wrong with a backward pass; dual numbers and Gradients, on which it stands.
#include <m2lm/core.hpp>
#include <m2lm/testing/gradient_check.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

namespace {

using namespace m2lm;
using m2lm::testing::gradient_check;
using m2lm::testing::GradientReport;

enum class Mistake { none, sign, dx_added, weight_overwritten, bias_forgotten, frozen_computed, saved_forward_differs, not_a_number, one_element, transposed };

/// y = tanh(x)·wᵀ + b, with one mistake.
template <class B>
struct Layer {
  using S = ScalarOf<B>;
  struct Saved {
    Matrix<const S> x;
  };
  Mistake mistake;
  Parameter w{Shape{3, 4}}, b{Shape{3}};
  Tensor<S> w_values, b_values;

  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("w", self.w);
    visit("b", self.b);
  }
  void prepare(Context<B>&) {
    w_values = w.value.template to<S>();
    b_values = b.value.template to<S>();
  }
  S weight(std::int64_t j, std::int64_t k) const { return w_values.data()[j * 4 + k]; }
  void forward(Context<B>&, Matrix<const S> x, Matrix<S> y, Saved* saved) const {
    using std::tanh;
    for (std::int64_t i = 0; i < x.extent(0); ++i)
      for (std::int64_t j = 0; j < 3; ++j) {
        S sum = b_values.data()[j];
        for (std::int64_t k = 0; k < 4; ++k) sum += tanh(x(i, k)) * weight(j, k);
        y(i, j) = saved && mistake == Mistake::saved_forward_differs ? sum * S(1.001) : sum;
      }
    if (saved) *saved = {x};
  }
  void backward(Context<B>&, Matrix<const S> dy, const Saved& saved, Gradients<S>& gradients, Matrix<S> dx) const {
    using std::tanh;
    Tensor<S>*dw = gradients.find(w), *db = gradients.find(b);
    for (std::int64_t i = 0; i < dy.extent(0); ++i) {
      for (std::int64_t j = 0; j < 3 && db && mistake != Mistake::bias_forgotten; ++j) db->data()[j] += dy(i, j);
      for (std::int64_t k = 0; k < 4; ++k) {
        const S t = tanh(saved.x(i, k));
        S sum(0);
        for (std::int64_t j = 0; j < 3; ++j) {
          sum += dy(i, j) * (mistake == Mistake::transposed ? w_values.data()[(j * 4 + k) / 4 + 3 * ((j * 4 + k) % 4)] : weight(j, k));
          if (!dw) continue;
          S& out = dw->data()[j * 4 + k];
          if (mistake == Mistake::weight_overwritten && i == 0) out = S(0);
          out += dy(i, j) * t;
          // A gradient that is only right while another parameter is trained too.
          if (mistake == Mistake::frozen_computed && !db) out += S(1e-9);
        }
        S slope = S(1) - t * t;
        if (mistake == Mistake::sign) slope = -slope;
        if (mistake == Mistake::not_a_number) slope = S(std::numeric_limits<double>::quiet_NaN());
        if (mistake == Mistake::one_element && i == 1 && k == 2) slope = slope * S(1 + 1e-9);
        if (dx.data()) dx(i, k) = sum * slope + (mistake == Mistake::dx_added ? dx(i, k) : S(0));
      }
    }
  }
};

GradientReport check(Mistake mistake) {
  return gradient_check([&]<class B>() { return Layer<B>{.mistake = mistake, .w_values = {}, .b_values = {}}; }, Shape{2, 4}, Shape{2, 3});
}

}  // namespace

TEST_CASE("gradient_check") {
  const GradientReport right = check(Mistake::none);
  CHECK_MESSAGE(right.passed, right.string());
  CHECK(right.bound < 1e-12);
  // Three directions and every element of w, b and the input, once more each with others frozen, and the outputs.
  CHECK(right.comparisons == (3 + 12) + (3 + 3) + (3 + 8) + (12 + 3 + 8) + 6);

  const auto found_in = [](Mistake mistake) {
    const GradientReport report = check(mistake);
    CHECK_FALSE(report.passed);
    CHECK(report.string().find("differ at") != std::string::npos);
    return report.worst_tensor;
  };
  CHECK(found_in(Mistake::sign).starts_with("input"));
  CHECK(found_in(Mistake::dx_added).starts_with("input"));
  CHECK(found_in(Mistake::weight_overwritten).starts_with("w"));
  CHECK(found_in(Mistake::bias_forgotten).starts_with("b"));
  CHECK(found_in(Mistake::frozen_computed) == "w, while others are frozen");
  CHECK(found_in(Mistake::saved_forward_differs) == "the output with and without Saved");
  CHECK(found_in(Mistake::not_a_number).starts_with("input"));
  CHECK(found_in(Mistake::one_element) == "input[6]");  // one part in a thousand million, in one element
  CHECK(found_in(Mistake::transposed).starts_with("input"));
}

TEST_CASE("dual numbers") {
  using D = Dual<double>;
  // Against difference quotients of fourth order: error h⁴·f⁗′ + eps·f/h, about 1e-12 with h = 1e-3.
  const auto check_function = [](const char* name, auto f, std::initializer_list<double> points) {
    for (const double x : points) {
      const D y = f(D(x, 1));
      const double h = 1e-3, quotient = (8 * (f(D(x + h)).value - f(D(x - h)).value) - (f(D(x + 2 * h)).value - f(D(x - 2 * h)).value)) / (12 * h);
      CHECK_MESSAGE(std::abs(y.tangent - quotient) < 1e-9 * (1 + std::abs(quotient)), name, " at ", x, ": ", y.tangent, " instead of ", quotient);
      CHECK(f(D(x)).tangent == 0);
    }
  };
  check_function("exp", [](D x) { return exp(x); }, {-2, 0, 1.5});
  check_function("log", [](D x) { return log(x); }, {0.5, 3});
  check_function("sqrt", [](D x) { return sqrt(x); }, {0.5, 3});
  check_function("tanh", [](D x) { return tanh(x); }, {-1, 0, 2});
  check_function("erf", [](D x) { return erf(x); }, {-1, 0, 2});
  check_function("sin", [](D x) { return sin(x); }, {-1, 2});
  check_function("cos", [](D x) { return cos(x); }, {-1, 2});
  check_function("abs", [](D x) { return abs(x); }, {-1, 2});
  check_function("arithmetic", [](D x) { return (x * x - 3 * x + 1) / (x + 2) - (-x) * +x; }, {-1, 0.5, 4});
  check_function("assignment", [](D x) { D y = x; y += 2; y *= x; y -= x / 3; y /= x + 5; return y; }, {-1, 0.5, 4});
  CHECK(D(1, 5) < D(2, -5));
  CHECK(D(1, 5) == D(1, 7));
  CHECK(D(2) > 1);
}

TEST_CASE("tensors of a scalar without a dtype") {
  using D = Dual<double>;
  Tensor<D> values(Shape{2, 2});
  for (std::int64_t i = 0; i < 4; ++i) values.data()[i] = D(static_cast<double>(i), 10.0 + static_cast<double>(i));
  const AnyTensor stored(std::move(values));
  CHECK(stored.dtype() == DType::native);
  CHECK(stored.bytes() == 4 * sizeof(D));
  D out[2];
  stored.copy_to(out, 1, 2);
  CHECK((out[0].value == 1 && out[0].tangent == 11 && out[1].value == 2 && out[1].tangent == 12));
  CHECK(stored.rows(1, 2).to<D>().data()[0].tangent == 12);
  float other[1];
  CHECK_THROWS_AS(stored.copy_to(other, 0, 1), ShapeError);
  Dual<long double> another[1];
  CHECK_THROWS_AS(stored.copy_to(another, 0, 1), ShapeError);
}

TEST_CASE("Gradients") {
  Linear<Reference<double>> first(2, 3, true), second(3, 2, false);
  Gradients<double> gradients;
  gradients.add(first, [](std::string_view name) { return name == "a.weight"; }, "a");
  gradients.add("b.weight", second.weight);
  gradients.add("again", second.weight);
  REQUIRE(gradients.entries().size() == 2);
  CHECK(gradients.entries()[0].name == "a.weight");
  CHECK(gradients.entries()[1].name == "b.weight");
  CHECK(gradients.trains(first));
  CHECK_FALSE(gradients.trains(first.bias));
  CHECK(gradients.find(first.bias) == nullptr);
  CHECK(gradients.find(second.weight) == &gradients.entries()[1].value);
  CHECK(gradients.norm() == 0);
  gradients.find(first.weight)->data()[5] = 3;
  gradients.find(second.weight)->data()[0] = -4;
  CHECK(gradients.norm() == 5);
  gradients.clear();
  CHECK(gradients.norm() == 0);
  std::vector<Linear<Reference<double>>> layers(4);
  for (auto& layer : layers) layer = Linear<Reference<double>>(1, 1, false);
  CHECK(first_trained(layers, gradients) == 4);
  gradients.add("x", layers[2].weight);
  CHECK(first_trained(layers, gradients) == 2);
}

TEST_CASE("a tensor that its owner goes on changing") {
  const auto master = std::make_shared<Tensor<float>>(Shape{2});
  const AnyTensor view(master);
  master->data()[1] = 5;
  CHECK(view.at(1) == 5);
  CHECK(view.dtype() == DType::f32);
}
