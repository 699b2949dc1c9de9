// Probe: the loss is over the answer alone.
#include <m2lm/m2lm.hpp>

#include <doctest/doctest.h>

#include <support/environment.hpp>

#include <cmath>

namespace {

using namespace m2lm;

using Lm = Model<Reference<float>, Precision{.weights = DType::f32}, LlamaDecoder<>>;

}  // namespace

TEST_CASE("the prompt takes no part in the loss") {
  const Lm model = Lm::from_pretrained(m2lm_test::source_file("tests/golden/llama/mha_plain"));
  const Tensor<float> logits = model.logits(model.prompt(std::vector<std::int32_t>{1, 20, 30, 40}));
  const float* row = logits.data() + 3 * logits.shape()[1];
  double sum = 0;
  for (std::int64_t i = 0; i < logits.shape()[1]; ++i) sum += std::exp(static_cast<double>(row[i]));
  train::Trainer<Lm> trainer(model, {});
  const train::Example<Lm> example{.prompt = model.prompt(std::vector<std::int32_t>{1, 20, 30, 40}), .answer = {}, .answer_ids = {50}};
  CHECK(trainer.loss(std::span(&example, 1)) == doctest::Approx(std::log(sum) - static_cast<double>(row[50])).epsilon(1e-5));
}
