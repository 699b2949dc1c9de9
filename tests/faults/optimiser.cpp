// Probe: two steps of AdamW, worked out by hand.
#include <m2lm/train/adamw.hpp>

#include <doctest/doctest.h>

#include <cmath>

namespace {

struct One {
  m2lm::Parameter x{m2lm::Shape{1}};
  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("x", self.x);
  }
};

}  // namespace

TEST_CASE("AdamW") {
  const One model;
  m2lm::Gradients<double> gradients(model);
  m2lm::train::AdamW<double> adamw(gradients, {.beta1 = 0.5, .beta2 = 0.75, .eps = 0, .weight_decay = 0.5});
  const auto x = std::make_shared<m2lm::Tensor<double>>(m2lm::Shape{1});
  x->data()[0] = 4;
  gradients.find(model.x)->data()[0] = 2;
  // Decay: 4·(1 − 0.1·0.5) = 3.8. m = 1, v = 1; corrected 2 and 4: a step of 0.1·2/2.
  adamw.step(gradients, std::span(&x, 1), 0.1);
  CHECK(x->data()[0] == doctest::Approx(3.7));
  // Decay: 3.7·0.95 = 3.515. m = 0, v = 0.75 + 0.25: no step.
  gradients.find(model.x)->data()[0] = -1;
  adamw.step(gradients, std::span(&x, 1), 0.1);
  CHECK(x->data()[0] == doctest::Approx(3.515));
}
