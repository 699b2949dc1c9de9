// Probe: what a user's components rest on: sinks, prefixes with delimiters, media that a hook reads.
#include <seams/alignment.hpp>
#include <seams/prefix_and_runs.hpp>
#include <seams/pyramid_hook.hpp>

#include <m2lm/testing/tolerance.hpp>

#include <doctest/doctest.h>

#include <support/environment.hpp>

#include <string>
#include <vector>

namespace {

using namespace m2lm;

using B = Reference<float>;
constexpr Precision f32{.weights = DType::f32};

std::vector<float> values(const AnyTensor& tensor) {
  const Tensor<float> t = tensor.to<float>();
  return {t.data(), t.data() + t.elements()};
}
std::vector<std::int32_t> ids(const AnyTensor& tensor) {
  std::vector<std::int32_t> out;
  for (std::int64_t i = 0; i < tensor.shape().elements(); ++i) out.push_back(static_cast<std::int32_t>(tensor.at(i)));
  return out;
}
std::string folder(const char* name) { return m2lm_test::source_file(std::string("tests/golden/seams/") + name); }

}  // namespace

TEST_CASE("alignment") {
  const auto model = lab::AlignedModel<B, f32>::from_pretrained(folder("alignment"));
  const Safetensors golden = Safetensors::open(folder("alignment") + "/golden.safetensors");
  auto prompt = model.prompt({1, 17, 90, 90, 5, 40, 90, 33});
  for (const char* name : {"sound.0", "sound.1", "sound.2"}) prompt.attach<"sound">(values(golden.tensor(name)));
  CHECK(m2lm::testing::relative_error(model.logits(prompt), golden.tensor("logits")) < 2e-5);
}

TEST_CASE("prefixes and runs") {
  const auto model = lab::PrefixModel<B, f32>::from_pretrained(folder("prefix_and_runs"));
  const Safetensors golden = Safetensors::open(folder("prefix_and_runs") + "/golden.safetensors");
  auto prompt = model.prompt({1, 44, -2, -2, -2, -2, -2, -2, 45, 46, -2, -2, -2, 47});
  for (const char* name : {"image.0", "image.1"}) prompt.attach<"image">(values(golden.tensor(name)));
  for (const char* name : {"sound.0", "sound.1", "sound.2"}) prompt.attach<"sound">(values(golden.tensor(name)));
  prompt.attach<"video">(values(golden.tensor("video.0")));
  CHECK(model.input_ids(prompt) == ids(golden.tensor("input_ids")));
}

TEST_CASE("a hook") {
  const auto model = lab::MapModel<B, f32>::from_pretrained(folder("pyramid_hook"));
  const Safetensors golden = Safetensors::open(folder("pyramid_hook") + "/golden.safetensors");
  auto prompt = model.prompt({1, 8, 21, 91, 60, 11, 91, 60, 11});
  for (const char* name : {"map.0", "map.1"}) prompt.attach<"map">(values(golden.tensor(name)));
  CHECK(model.generate(prompt, {.max_new_tokens = 8, .ignore_eos = true}).tokens == ids(golden.tensor("greedy")));
}
