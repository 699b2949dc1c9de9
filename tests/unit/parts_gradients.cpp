// The gradients of blocks and whole parts against exact derivatives: LLaMA block and decoder, ViT block and ClipVit, projectors.
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "gradients_support.hpp"

namespace {

using namespace gradients;

template <VitPolicy policy>
void check_encoder(std::int64_t tokens, std::int64_t width) {
  const ClipVisionConfig c = small_encoder();
  const auto make = [&]<class B>() { return Encoder<B, policy>(c); };
  CHECK_GRADIENT(gradient_check(make, Shape{0, 0}, Shape{tokens, width}, {.directions = 2, .coordinates = 6}), "features ", static_cast<int>(policy.features),
                 " of layer ", policy.feature_layer);
}

}  // namespace

TEST_CASE("the LLaMA block") {
  for (const std::vector<std::int64_t>& lengths : {std::vector<std::int64_t>{1}, {5}, {3, 1, 4}})
    for (const std::int64_t window : {0, 2})
      for (const bool bias : {false, true}) {
        LlamaConfig c = small_decoder();
        c.sliding_window = window;
        c.attention_bias = c.mlp_bias = bias;
        const auto make = [&]<class B>() { return LlamaBlock<B>(c, lengths); };
        CHECK_GRADIENT(gradient_check(make, Shape{sum(lengths), c.hidden_size}, Shape{sum(lengths), c.hidden_size}, {.directions = 2, .coordinates = 12}),
                       lengths.size(), " sequences, window ", window, ", bias ", bias);
      }
}

TEST_CASE("the whole decoder, from embeddings to logits") {
  for (const bool tied : {false, true}) {
    LlamaConfig c = small_decoder();
    c.tie_word_embeddings = tied;
    const std::vector<std::int64_t> lengths{4, 1, 2};
    const auto make = [&]<class B>() { return Decoder<B>(c, lengths); };
    CHECK_GRADIENT(gradient_check(make, Shape{7, c.hidden_size}, Shape{7, c.vocab_size}, {.directions = 2, .coordinates = 12}), "tied ", tied);
  }
}

TEST_CASE("a backward pass that ends at the lowest trained block") {
  using B = Reference<double>;
  const LlamaConfig c = small_decoder();
  LlamaDecoder<>::On<B, native> decoder(c);
  Rng rng(9);
  for_each_parameter(
      [&](std::string_view, Parameter& p) {
        Tensor<double> t(p.shape);
        for (double& v : t.span()) v = rng.uniform() - 0.5;
        p.value = AnyTensor(std::move(t));
      },
      decoder);
  B backend;
  Arena arena, tape;
  Context<B> ctx{backend, arena, nullptr, &tape};
  decoder.prepare(ctx, native, {});
  const SequenceRows<B> rows{nullptr, 0, 3};
  Tensor<double> h(Shape{3, c.hidden_size});
  for (double& v : h.span()) v = rng.uniform();
  LlamaDecoder<>::On<B, native>::Saved saved;
  decoder.forward(ctx, h.view<2>(), std::span(&rows, 1), {}, &saved);
  const auto upper_gradient = [&](bool wants_input) {
    Gradients<double> gradients;
    gradients.add(decoder, [](std::string_view name) { return name.starts_with("model.layers.1."); });
    CHECK(gradients.entries().size() == 9);
    Tensor<double> dh(h.shape());
    for (double& v : dh.span()) v = 1;
    decoder.backward(ctx, dh.view<2>(), saved, gradients, wants_input);
    std::vector<double> all;
    for (const auto& e : gradients.entries()) all.insert(all.end(), e.value.span().begin(), e.value.span().end());
    return all;
  };
  const std::vector<double> expected = upper_gradient(true);
  CHECK(expected == upper_gradient(false));
  saved.layers[0] = {};  // were the lower block reached, it would read this
  CHECK(expected == upper_gradient(false));
}

TEST_CASE("a decoder packed for inference says so when it is asked to save") {
  using B = Reference<double>;
  GatedMlp<B> mlp(2, 3, false, Activation::silu);
  for_each_parameter([](std::string_view, Parameter& p) { p.value = AnyTensor(Tensor<double>(p.shape)); }, mlp);
  B backend;
  Arena arena, tape;
  Context<B> inference{backend, arena}, training{backend, arena, nullptr, &tape};
  mlp.prepare(inference, DType::f64);
  Tensor<double> x(Shape{1, 2}), h(Shape{1, 2});
  GatedMlp<B>::Saved saved;
  CHECK_THROWS_WITH_AS(mlp.forward(training, x.view<2>(), h.view<2>(), &saved), doctest::Contains("context with a tape"), ShapeError);
  mlp.prepare(training, DType::f64);
  mlp.forward(training, x.view<2>(), h.view<2>(), &saved);
  mlp.forward(inference, x.view<2>(), h.view<2>());
  CHECK_THROWS_WITH_AS(mlp.forward(inference, x.view<2>(), h.view<2>(), &saved), doctest::Contains("needs a context with a tape"), ShapeError);
}

TEST_CASE("the ViT block") {
  for (const std::int64_t tokens : {1, 5}) {
    const ClipVisionConfig c = small_encoder();
    const auto make = [&]<class B>() { return VitBlock<B>{typename ClipVit<>::Block<B>(c)}; };
    CHECK_GRADIENT(gradient_check(make, Shape{tokens, c.hidden_size}, Shape{tokens, c.hidden_size}), tokens, " tokens");
  }
}

TEST_CASE("ClipVit, whatever it hands on") {
  check_encoder<VitPolicy{.feature_layer = -2, .features = VitFeatures::patches}>(4, 6);
  check_encoder<VitPolicy{.feature_layer = -1, .features = VitFeatures::all_tokens}>(5, 6);
  check_encoder<VitPolicy{.feature_layer = 0, .features = VitFeatures::patches}>(4, 6);
  check_encoder<VitPolicy{.features = VitFeatures::pooled}>(1, 6);
  check_encoder<VitPolicy{.features = VitFeatures::projected}>(1, 4);
  check_encoder<VitPolicy{.features = VitFeatures::projected_tokens}>(4, 4);
}

TEST_CASE("projectors") {
  const auto check = [](const auto& make, const ProjectorConfig& c, const char* name) {
    CHECK_GRADIENT(gradient_check(make, Shape{4, c.input_width}, Shape{4, c.output_width}), name, ", activation ", static_cast<int>(c.activation), ", bias ", c.bias);
  };
  for (const Activation activation : {Activation::gelu, Activation::relu, Activation::silu})
    for (const bool bias : {false, true}) {
      const ProjectorConfig c{.input_width = 5, .output_width = 3, .activation = activation, .bias = bias};
      check([&]<class B>() { return typename MlpProjector<1>::template On<B, native>(c); }, c, "one layer");
      check([&]<class B>() { return typename MlpProjector<2>::template On<B, native>(c); }, c, "two layers");
      check([&]<class B>() { return typename MlpProjector<3>::template On<B, native>(c); }, c, "three layers");
    }
  const ProjectorConfig same{.input_width = 3, .output_width = 3};
  check([&]<class B>() { return typename IdentityProjector::template On<B, native>(same); }, same, "identity");
}
