// Probe: the decoder, the encoder and the projector, each loaded alone, against transformers.
#include <m2lm/backends/reference/reference.hpp>
#include <m2lm/io/checkpoint.hpp>
#include <m2lm/io/config.hpp>
#include <m2lm/io/file.hpp>
#include <m2lm/io/safetensors.hpp>
#include <m2lm/models/hf_config.hpp>
#include <m2lm/models/loader.hpp>
#include <m2lm/testing/tolerance.hpp>

#include <doctest/doctest.h>

#include <support/environment.hpp>

#include <string>
#include <vector>

namespace {

using namespace m2lm;

using B = Reference<float>;
constexpr Precision f32{.weights = DType::f32};
constexpr double tolerance = 2e-5;

struct Work {
  B backend;
  Arena arena;
  Context<B> ctx{backend, arena};
};

template <class P>
void load(P& part, const std::string& directory, std::string prefix) {
  require_complete(load_parameters(part, Checkpoint::open(directory), std::move(prefix)), directory);
}

void check_decoder(const std::string& name) {
  const std::string directory = m2lm_test::source_file("tests/golden/llama/" + name);
  const Safetensors golden = Safetensors::open(directory + "/golden.safetensors");
  LlamaConfig config;
  read_config(ConfigValue::parse_file(directory + "/config.json"), config);
  LlamaDecoder<>::On<B, f32> decoder(config);
  load(decoder, directory, "");
  Work work;
  decoder.prepare(work.ctx, f32, {});
  const AnyTensor recorded = golden.tensor("input_ids");
  const std::int64_t tokens = recorded.shape().elements();
  std::vector<std::int32_t> ids;
  for (std::int64_t i = 0; i < tokens; ++i) ids.push_back(static_cast<std::int32_t>(recorded.at(i)));
  Tensor<float> h(Shape{tokens, config.hidden_size}), logits(Shape{tokens, config.vocab_size});
  decoder.embed_tokens.forward(work.ctx, ids, h.view<2>());
  auto cache = decoder.make_cache(work.ctx, DType::f32, tokens);
  const SequenceRows<B> rows{&cache, 0, tokens};
  decoder.forward(work.ctx, h.view<2>(), std::span(&rows, 1));
  decoder.norm.forward(work.ctx, h.view<2>(), h.view<2>());
  decoder.head.forward(work.ctx, h.view<2>(), logits.view<2>());
  CHECK(m2lm::testing::relative_error(logits, golden.tensor("logits")) < tolerance);
}

}  // namespace

TEST_CASE("decoders") {
  for (const char* name : {"mha_plain", "mqa_llama3_hd10", "mha_wide_heads_bf16", "mistral_window"}) check_decoder(name);
}

TEST_CASE("encoder and projector") {
  const std::string directory = m2lm_test::source_file("tests/golden/llava/old_keys_m2_default");
  const Safetensors golden = Safetensors::open(directory + "/golden_1img.safetensors");
  const ConfigValue root = ConfigValue::parse_file(directory + "/config.json");
  ClipVisionConfig config;
  read_config(root, config);
  ClipVit<>::On<B, f32> encoder(config);
  load(encoder, directory, "vision_tower");
  const AnyTensor features = golden.tensor("features");
  ProjectorConfig projector_config{.input_width = encoder.width(), .output_width = features.shape()[2]};
  read_config(root, projector_config);
  MlpProjector<2>::On<B, f32> projector(projector_config);
  load(projector, directory, "multi_modal_projector");
  Work work;
  encoder.prepare(work.ctx, DType::f32);
  projector.prepare(work.ctx, DType::f32);
  Tensor<float> pixels(Shape{3, 28, 28}), hidden(Shape{encoder.tokens(), encoder.width()}), projected(Shape{encoder.tokens(), projector_config.output_width});
  golden.tensor("pixel_values").copy_to(pixels.data(), 0, pixels.elements());
  encoder.forward(work.ctx, pixels, hidden.view<2>());
  projector.forward(work.ctx, hidden.view<2>(), projected.view<2>());
  CHECK(m2lm::testing::relative_error(projected, features) < tolerance);
}
