// The gradients of blocks and whole parts against exact derivatives: LLaMA block and decoder, ViT block and ClipVit, projectors.
#include <m2lm/parts/decoders/llama.hpp>
#include <m2lm/parts/encoders/clip_vit.hpp>
#include <m2lm/parts/projectors/mlp_projector.hpp>
#include <m2lm/testing/gradient_check.hpp>

#include <doctest/doctest.h>

#include <string>
#include <vector>

namespace {

using namespace m2lm;
using m2lm::testing::gradient_check;
using m2lm::testing::GradientReport;

constexpr Precision native{.weights = DType::f64};

#define CHECK_GRADIENT(report, ...)                                     \
  do {                                                                  \
    const GradientReport r = (report);                                  \
    CHECK_MESSAGE(r.passed, r.string(), " with ", concat(__VA_ARGS__)); \
    CHECK(r.comparisons > 0);                                           \
  } while (false)

template <class B>
std::vector<SequenceRows<B>> whole_sequences(const std::vector<std::int64_t>& lengths) {
  std::vector<SequenceRows<B>> out;
  std::int64_t begin = 0;
  for (const std::int64_t n : lengths) {
    out.push_back({nullptr, begin, n});
    begin += n;
  }
  return out;
}
std::int64_t sum(const std::vector<std::int64_t>& lengths) {
  std::int64_t n = 0;
  for (const std::int64_t l : lengths) n += l;
  return n;
}

LlamaConfig small_decoder() {
  LlamaConfig c;
  c.vocab_size = 11;
  c.hidden_size = 6;
  c.intermediate_size = 7;
  c.num_layers = 2;
  c.num_heads = 4;
  c.num_kv_heads = 2;
  c.head_dim = 4;
  return c;
}

/// y = block(x), the gradient of a residual stream.
template <class B>
struct LlamaBlock {
  using S = ScalarOf<B>;
  using Block = typename LlamaDecoder<>::Block<B>;
  using Saved = typename Block::Saved;
  Block block;
  std::vector<SequenceRows<B>> sequences;
  Tensor<S> cos, sin;
  LlamaBlock(const LlamaConfig& c, const std::vector<std::int64_t>& lengths)
      : block(c), sequences(whole_sequences<B>(lengths)), cos(Shape{sum(lengths), c.head_dim / 2}), sin(cos.shape()) {
    const std::vector<float> frequencies = rope_frequencies(c.rope, c.head_dim);
    for (const SequenceRows<B>& s : sequences)
      rope_angles<S>(frequencies, 0, cos.template view<2>().rows(s.begin, s.begin + s.count), sin.template view<2>().rows(s.begin, s.begin + s.count));
  }
  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("", self.block);
  }
  void prepare(Context<B>& ctx, DType format) { block.prepare(ctx, format); }
  void forward(Context<B>& ctx, Matrix<const S> x, Matrix<S> y, Saved* saved) const {
    copy_rows(x, y);
    block.forward(ctx, 0, sequences, cos.template view<2>(), sin.template view<2>(), y, [](Matrix<S>) {}, saved);
  }
  void backward(Context<B>& ctx, Matrix<const S> dy, const Saved& saved, Gradients<S>& gradients, Matrix<S> dx) const {
    const Arena::Scope scope(ctx.arena);
    const Matrix<S> dh = dx.data() ? dx : ctx.arena.template matrix<S>(dy.extent(0), dy.extent(1));
    copy_rows(dy, dh);
    block.backward(ctx, dh, saved, gradients, [](Matrix<S>) {});
  }
};

/// logits = decoder(embedding of ids, plus x: the place where media enter).
template <class B>
struct Decoder {
  using S = ScalarOf<B>;
  using Part = typename LlamaDecoder<>::template On<B, native>;
  using Saved = typename Part::Saved;
  Part part;
  std::vector<std::int32_t> ids;
  std::vector<SequenceRows<B>> sequences;
  Decoder(const LlamaConfig& c, const std::vector<std::int64_t>& lengths) : part(c), sequences(whole_sequences<B>(lengths)) {
    for (std::int64_t i = 0; i < sum(lengths); ++i) ids.push_back(static_cast<std::int32_t>((5 * i + 2) % c.vocab_size));
  }
  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("", self.part);
  }
  void prepare(Context<B>& ctx, DType) { part.prepare(ctx, native, {}); }
  void forward(Context<B>& ctx, Matrix<const S> x, Matrix<S> logits, Saved* saved) const {
    const Arena::Scope scope(ctx.arena);
    const Matrix<S> h = ctx.storage(saved != nullptr).template matrix<S>(x.extent(0), x.extent(1));
    part.embed_tokens.forward(ctx, ids, h);
    ops::add_rows(ctx, h, x);
    part.forward(ctx, h, sequences, {}, saved);
    part.predict(ctx, h, logits, saved);
  }
  void backward(Context<B>& ctx, Matrix<const S> dlogits, const Saved& saved, Gradients<S>& gradients, Matrix<S> dx) const {
    const Arena::Scope scope(ctx.arena);
    const Matrix<S> dh = dx.data() ? dx : ctx.arena.template matrix<S>(dlogits.extent(0), part.config().hidden_size);
    part.predict_backward(ctx, dlogits, saved, gradients, dh);
    const bool table = gradients.trains(part.embed_tokens);
    part.backward(ctx, dh, saved, gradients, dx.data() != nullptr || table);
    part.embed_tokens.backward(ctx, ids, dh, gradients);
  }
};

template <class B>
struct VitBlock {
  using S = ScalarOf<B>;
  using Block = typename ClipVit<>::Block<B>;
  using Saved = typename Block::Saved;
  Block block;
  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("", self.block);
  }
  void prepare(Context<B>& ctx, DType format) { block.prepare(ctx, format); }
  void forward(Context<B>& ctx, Matrix<const S> x, Matrix<S> y, Saved* saved) const {
    copy_rows(x, y);
    block.forward(ctx, DType::f64, y, saved);
  }
  void backward(Context<B>& ctx, Matrix<const S> dy, const Saved& saved, Gradients<S>& gradients, Matrix<S> dx) const {
    const Arena::Scope scope(ctx.arena);
    const Matrix<S> dh = dx.data() ? dx : ctx.arena.template matrix<S>(dy.extent(0), dy.extent(1));
    copy_rows(dy, dh);
    block.backward(ctx, dh, saved, gradients);
  }
};

/// Features of one picture, with respect to the parameters.
template <class B, VitPolicy policy>
struct Encoder {
  using S = ScalarOf<B>;
  using Part = typename ClipVit<policy>::template On<B, native>;
  using Saved = typename Part::Saved;
  Part part;
  Tensor<float> image;
  explicit Encoder(const ClipVisionConfig& c) : part(c), image(Shape{c.num_channels, c.image_size, c.image_size}) {
    Rng rng(3);
    for (float& v : image.span()) v = static_cast<float>(2 * rng.uniform() - 1);
  }
  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("", self.part);
  }
  void prepare(Context<B>& ctx, DType format) { part.prepare(ctx, format); }
  void forward(Context<B>& ctx, Matrix<const S>, Matrix<S> features, Saved* saved) const { part.forward(ctx, image, features, {}, saved); }
  void backward(Context<B>& ctx, Matrix<const S> dfeatures, const Saved& saved, Gradients<S>& gradients, Matrix<S>) const {
    part.backward(ctx, dfeatures, saved, gradients);
  }
};

ClipVisionConfig small_encoder() {
  ClipVisionConfig c;
  c.hidden_size = 6;
  c.intermediate_size = 5;
  c.num_layers = 2;
  c.num_heads = 3;
  c.image_size = 5;
  c.patch_size = 2;
  c.projection_dim = 4;
  return c;
}

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
