// AdamW and clipping against torch.optim.AdamW, schedules, and the choice of parameters by name.
#include <m2lm/m2lm.hpp>

#include <doctest/doctest.h>

#include <support.hpp>

#include <cmath>

namespace {

using namespace m2lm_test;
namespace train = m2lm::train;
using m2lm::Gradients;
using m2lm::Parameter;
using m2lm::Shape;
using m2lm::Tensor;

struct OneVector {
  Parameter x;
  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("x", self.x);
  }
};

TEST_CASE("AdamW: twenty steps of torch.optim.AdamW, free and clipped") {
  const auto golden = m2lm::ConfigValue::parse_file(m2lm_test::golden("train/adamw.json"));
  const auto begin = golden.get_list<double>("begin");
  const auto betas = golden.get_list<double>("betas");
  const train::AdamWOptions options{.beta1 = betas[0], .beta2 = betas[1], .eps = golden.get<double>("eps"), .weight_decay = golden.get<double>("weight_decay")};
  const auto n = static_cast<std::int64_t>(begin.size());
  const auto run = [&]<class S>(S, const char* name, double max_norm, double tolerance) {
    OneVector model{Parameter(Shape{n})};
    Gradients<S> gradients(model);
    train::AdamW<S> adamw(gradients, options);
    const auto x = std::make_shared<Tensor<S>>(Shape{n});
    for (std::int64_t i = 0; i < n; ++i) x->data()[i] = static_cast<S>(begin[static_cast<std::size_t>(i)]);
    const auto rows = golden[name];
    for (std::int64_t t = 0; t < 20; ++t) {
      for (std::int64_t i = 0; i < n; ++i) gradients.find(model.x)->data()[i] = static_cast<S>(static_cast<double>((t * (2 * i + 3) + i) % 11 - 5) / 8);
      double squares = 0;
      for (const S g : gradients.find(model.x)->span()) squares += static_cast<double>(g) * static_cast<double>(g);
      CHECK(train::clip_gradients(gradients, max_norm) == doctest::Approx(std::sqrt(squares)).epsilon(1e-12));
      adamw.step(gradients, std::span(&x, 1), golden.get<double>("lr"));
      const auto expected = rows.at(static_cast<std::size_t>(t));
      for (std::int64_t i = 0; i < n; ++i) {
        const double want = expected.at(static_cast<std::size_t>(i)).as<double>();
        CHECK_MESSAGE(std::abs(static_cast<double>(x->data()[i]) - want) <= tolerance, std::string(name), " step ", t, " element ", i, ": ",
                      static_cast<double>(x->data()[i]), " instead of ", want);
      }
    }
    CHECK(adamw.steps() == 20);
  };
  // A step moves an element of at most 3 by at most 0.05·(1 + 0.3): 20 steps of ten roundings each.
  run(double{}, "free", 0, 20 * 10 * 3 * 0x1.0p-53);
  run(double{}, "clipped", golden.get<double>("max_norm"), 20 * 10 * 3 * 0x1.0p-53);
  run(float{}, "free", 0, 20 * 10 * 3 * 0x1.0p-24);
  run(float{}, "clipped", golden.get<double>("max_norm"), 20 * 10 * 3 * 0x1.0p-24);
}

TEST_CASE("AdamW: options out of range") {
  OneVector model{Parameter(Shape{1})};
  const Gradients<float> gradients(model);
  CHECK(has(message_of<m2lm::OptionError>([&] { train::AdamW<float>(gradients, {.beta1 = 1.0}); }), "betas"));
  CHECK(has(message_of<m2lm::OptionError>([&] { train::AdamW<float>(gradients, {.eps = -1}); }), "eps"));
}

TEST_CASE("schedules: warm-up, nothing, linear, cosine") {
  const train::Schedule constant{.peak = 2.0, .warmup_steps = 4};
  CHECK(constant(0) == 0.5);
  CHECK(constant(3) == 2.0);
  CHECK(constant(4) == 2.0);
  CHECK(constant(1000000) == 2.0);
  const train::Schedule linear{.peak = 2.0, .warmup_steps = 2, .decay = train::Decay::linear, .total_steps = 12, .floor = 0.5};
  CHECK(linear(1) == 2.0);
  CHECK(linear(2) == 2.0);
  CHECK(linear(7) == doctest::Approx(1.5));
  CHECK(linear(12) == doctest::Approx(1.0));
  CHECK(linear(99) == doctest::Approx(1.0));
  const train::Schedule cosine{.peak = 2.0, .decay = train::Decay::cosine, .total_steps = 10};
  CHECK(cosine(0) == 2.0);
  CHECK(cosine(5) == doctest::Approx(1.0));
  CHECK(cosine(10) == doctest::Approx(0.0));
  CHECK(!message_of<m2lm::OptionError>([] { train::Schedule{.decay = train::Decay::linear}.check(); }).empty());
  CHECK(!message_of<m2lm::OptionError>([] { train::Schedule{.peak = -1}.check(); }).empty());
}

TEST_CASE("parameters by pattern") {
  const std::vector<std::string> names{"model.layers.0.mlp.up_proj.weight", "vision_tower.x", "multi_modal_projector.linear_1.bias"};
  CHECK(train::Selection{}.trains("anything"));
  const train::Selection projector{.train = {"multi_modal_projector.*"}};
  CHECK(projector.trains(names[2]));
  CHECK(!projector.trains(names[0]));
  const train::Selection frozen{.freeze = {"vision_tower.*", "*.bias"}};
  CHECK(frozen.trains(names[0]));
  CHECK(!frozen.trains(names[1]));
  CHECK(!frozen.trains(names[2]));
  frozen.check(names);
  CHECK(has(message_of<m2lm::OptionError>([&] { train::Selection{.train = {"projector.*"}}.check(names); }), "\"projector.*\""));
  CHECK(has(message_of<m2lm::OptionError>([&] { train::Selection{.freeze = {"*"}}.check(names); }), "nothing is left"));
}

}  // namespace
