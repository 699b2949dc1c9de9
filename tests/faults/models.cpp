// Probe: what Model and Session add to the parts.
#include <m2lm/m2lm.hpp>
#include <m2lm/testing/tolerance.hpp>

#include <doctest/doctest.h>

#include <support/environment.hpp>

#include <string>
#include <vector>

namespace {

using namespace m2lm;

// Reference: nothing of the CPU's kernels is compiled into this program's templates.
using Vlm = Model<Reference<float>, Precision{.weights = DType::f32}, LlamaDecoder<>, Modality<"image", ClipVit<>, MlpProjector<2>>>;

}  // namespace

TEST_CASE("two pictures") {
  const std::string directory = m2lm_test::source_file("tests/golden/llava/old_keys_m2_default");
  const Safetensors golden = Safetensors::open(directory + "/golden_2img.safetensors");
  const Vlm model = Vlm::from_pretrained(directory);
  const AnyTensor ids = golden.tensor("input_ids"), features = golden.tensor("features");
  std::vector<std::int32_t> input;
  for (std::int64_t i = 0; i < ids.shape().elements(); ++i) input.push_back(static_cast<std::int32_t>(ids.at(i)));
  auto prompt = model.prompt(input);
  const std::int64_t elements = features.shape()[1] * features.shape()[2];
  for (std::int64_t i = 0; i < 2; ++i) {
    Tensor<float> rows(Shape{features.shape()[1], features.shape()[2]});
    features.copy_to(rows.data(), i * elements, elements);
    prompt.attach_embeddings<"image">(AnyTensor(std::move(rows)));
  }
  CHECK(m2lm::testing::relative_error(model.logits(prompt), golden.tensor("logits")) < 2e-5);
}

TEST_CASE("a session goes on where it stopped") {
  const Vlm model = Vlm::from_pretrained(m2lm_test::source_file("tests/golden/llava/old_keys_m2_default"));
  auto session = model.session();
  const GenerateOptions options{.max_new_tokens = 3, .ignore_eos = true};
  std::vector<std::int32_t> all{1, 5, 6, 7};
  const auto add = [&](const std::vector<std::int32_t>& more) { all.insert(all.end(), more.begin(), more.end()); };
  add(session.generate(model.prompt(all), options).tokens);
  const std::vector<std::int32_t> next{9, 10};
  add(next);
  CHECK(session.generate(model.prompt(next), options).tokens == model.generate(model.prompt(all), options).tokens);
  CHECK(session.length() == static_cast<std::int64_t>(all.size()) + 2);
}

TEST_CASE("a whole prompt with another picture") {
  const std::string directory = m2lm_test::source_file("tests/golden/llava/old_keys_m2_default");
  const Vlm model = Vlm::from_pretrained(directory);
  const GenerateOptions options{.max_new_tokens = 3, .ignore_eos = true};
  auto session = model.session();
  for (const float shade : {-1.0F, 1.0F}) {
    Tensor<float> rows(Shape{4, model.decoder_config().hidden_size});
    for (std::int64_t i = 0; i < rows.elements(); ++i) rows.data()[i] = shade * static_cast<float>(i % 5);
    auto prompt = model.prompt({1, 90, 5, 6});
    prompt.attach_embeddings<"image">(AnyTensor(std::move(rows)));
    CHECK(session.complete(prompt, options).timings.prefill_tokens == (shade < 0 ? 7 : 6));
  }
}
