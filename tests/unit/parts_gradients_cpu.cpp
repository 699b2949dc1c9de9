// labels: narrow-sanitizer
// Gradients of layers and parts on Cpu, at every instruction set, with one thread and with three, against Reference<double>.
#include <m2lm/core.hpp>

#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "gradients_support.hpp"
#include "ops_support.hpp"

namespace {

using namespace gradients;
using m2lm::testing::compare_gradients;

/// An f32 gradient passes each product twice, and adds sums over the rows: twice the blocks, and their longest sum.
template <class Make>
void check(const std::string& name, const Make& make, Shape input, Shape output, std::int64_t longest_sum, std::int64_t blocks) {
  const double tolerance = m2lm::testing::network_tolerance(0, m2lm::testing::epsilon_f32, longest_sum, 2 * blocks);
  for (const IsaLevel level : m2lm_test::levels())
    for (const int threads : {1, 3}) {
      const Cpu cpu(CpuOptions{.threads = threads, .max_isa = level});
      CHECK_GRADIENT(compare_gradients(cpu, make, input, output, tolerance), name, " at ", std::string(isa_name(level)), ", ", threads, " threads");
    }
}

LlamaConfig decoder_config() {
  LlamaConfig c = small_decoder();
  c.vocab_size = 50;
  c.hidden_size = 24;
  c.intermediate_size = 37;
  c.head_dim = 6;
  return c;
}

}  // namespace

TEST_CASE("layers") {
  check("linear", []<class B>() { return Linear<B>(19, 23, true); }, Shape{21, 19}, Shape{21, 23}, 23, 1);
  check("rms_norm", []<class B>() { return RmsNorm<B>(19, 1e-5); }, Shape{21, 19}, Shape{21, 19}, 21, 1);
  check("layer_norm", []<class B>() { return LayerNorm<B>(19, 1e-5); }, Shape{21, 19}, Shape{21, 19}, 21, 1);
  check("embedding", []<class B>() { return Lookup<B>{Embedding<B>(6, 17), {4, 0, 4, 5, 4}}; }, Shape{0, 0}, Shape{5, 17}, 3, 1);
  for (const Activation activation : {Activation::silu, Activation::gelu, Activation::gelu_tanh, Activation::quick_gelu}) {
    check("gated mlp", [=]<class B>() { return Added<GatedMlp<B>, B>{GatedMlp<B>(17, 29, true, activation)}; }, Shape{9, 17}, Shape{9, 17}, 29, 1);
    check("mlp", [=]<class B>() { return Added<Mlp<B>, B>{Mlp<B>(17, 29, activation)}; }, Shape{9, 17}, Shape{9, 17}, 29, 1);
  }
  check("cross-entropy", []<class B>() { return MeanLoss<B>{{3, ignored_target, 40, 0}, 1.0 / 3}; }, Shape{4, 41}, Shape{1, 1}, 41, 1);
}

TEST_CASE("attention and blocks") {
  for (const std::int64_t window : {0, 5}) {
    const AttentionConfig config{.hidden_size = 24, .heads = 4, .kv_heads = 2, .head_dim = 6, .window = window, .qkv_bias = true};
    const std::vector<std::int64_t> lengths{17, 1, 9};
    check("causal attention", [&]<class B>() { return Causal<B>(config, lengths, 27); }, Shape{27, 24}, Shape{27, 24}, 27, 1);
    LlamaConfig c = decoder_config();
    c.sliding_window = window;
    check("LLaMA block", [&]<class B>() { return LlamaBlock<B>(c, lengths); }, Shape{27, 24}, Shape{27, 24}, 37, 1);
  }
  const AttentionConfig config{.hidden_size = 18, .heads = 3, .kv_heads = 3, .head_dim = 6, .qkv_bias = true, .output_bias = true};
  check("full attention", [&]<class B>() { return Full<B>{FullAttention<B>(config)}; }, Shape{26, 18}, Shape{26, 18}, 26, 1);
  ClipVisionConfig vision = small_encoder();
  vision.hidden_size = 18;
  vision.intermediate_size = 31;
  check("ViT block", [&]<class B>() { return VitBlock<B>{typename ClipVit<>::Block<B>(vision)}; }, Shape{26, 18}, Shape{26, 18}, 31, 1);
}

TEST_CASE("whole parts") {
  for (const bool tied : {false, true}) {
    LlamaConfig c = decoder_config();
    c.tie_word_embeddings = tied;
    check("decoder", [&]<class B>() { return Decoder<B>(c, {11, 1, 6}); }, Shape{18, c.hidden_size}, Shape{18, c.vocab_size}, 50, 2);
  }
  const ClipVisionConfig vision = small_encoder();
  check("encoder", [&]<class B>() { return Encoder<B, VitPolicy{.features = VitFeatures::patches}>(vision); }, Shape{0, 0}, Shape{4, 6}, 12, 2);
  check("encoder, pooled and projected", [&]<class B>() { return Encoder<B, VitPolicy{.features = VitFeatures::projected}>(vision); }, Shape{0, 0}, Shape{1, 4}, 12, 2);
  const ProjectorConfig projector{.input_width = 19, .output_width = 23};
  check("projector", [&]<class B>() { return typename MlpProjector<2>::template On<B, native>(projector); }, Shape{20, 19}, Shape{20, 23}, 23, 1);
}
