// Layers and parts as the modules that gradient_check asks for, shared by the tests of gradients.
#pragma once

#include <m2lm/layers/attention.hpp>
#include <m2lm/layers/embedding.hpp>
#include <m2lm/layers/ffn.hpp>
#include <m2lm/layers/norm.hpp>
#include <m2lm/parts/decoders/llama.hpp>
#include <m2lm/parts/encoders/clip_vit.hpp>
#include <m2lm/parts/projectors/mlp_projector.hpp>
#include <m2lm/testing/gradient_check.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <string>
#include <vector>

#define CHECK_GRADIENT(report, ...)                                                   \
  do {                                                                                \
    const GradientReport r = (report);                                                \
    CHECK_MESSAGE(r.passed, r.string(), " with ", concat(__VA_ARGS__));               \
    CHECK(r.comparisons > 0);                                                         \
  } while (false)

namespace gradients {

using namespace m2lm;
using m2lm::testing::gradient_check;
using m2lm::testing::GradientReport;

constexpr Precision native{.weights = DType::f64};

/// y = layer(x), for layers that add to what is there.
template <class Layer, class B>
struct Added {
  using S = ScalarOf<B>;
  using Saved = typename Layer::Saved;
  Layer layer;
  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("", self.layer);
  }
  void prepare(Context<B>& ctx, DType format) { layer.prepare(ctx, format); }
  void forward(Context<B>& ctx, Matrix<const S> x, Matrix<S> y, Saved* saved) const {
    std::fill_n(y.data(), y.elements(), S(0));
    layer.forward(ctx, x, y, saved);
  }
  void backward(Context<B>& ctx, Matrix<const S> dy, const Saved& saved, Gradients<S>& gradients, Matrix<S> dx) const {
    layer.backward(ctx, dy, saved, gradients, dx);
  }
};

template <class B>
struct Lookup {
  using S = ScalarOf<B>;
  struct Saved {};
  Embedding<B> embedding;
  std::vector<std::int32_t> ids;
  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("", self.embedding);
  }
  void forward(Context<B>& ctx, Matrix<const S>, Matrix<S> y, Saved*) const { embedding.forward(ctx, ids, y); }
  void backward(Context<B>& ctx, Matrix<const S> dy, const Saved&, Gradients<S>& gradients, Matrix<S>) const { embedding.backward(ctx, ids, dy, gradients); }
};

/// Angles of positions 0, 1, … of each sequence.
template <class S>
struct Angles {
  Tensor<S> cos, sin;
  Angles(std::int64_t rows, std::int64_t head_dim) : cos(Shape{rows, head_dim / 2}), sin(cos.shape()) {
    const std::vector<float> frequencies = rope_frequencies({}, head_dim);
    rope_angles<S>(frequencies, 3, cos.template view<2>(), sin.template view<2>());
  }
};

template <class B>
struct Rotation {
  using S = ScalarOf<B>;
  struct Saved {};
  std::int64_t head_dim;
  Angles<S> angles;
  template <class V, class Self>
  static void fields(V&&, Self&) {}
  void forward(Context<B>& ctx, Matrix<const S> x, Matrix<S> y, Saved*) const {
    copy_rows(x, y);
    ops::rope(ctx, y, head_dim, angles.cos.template view<2>(), angles.sin.template view<2>());
  }
  void backward(Context<B>& ctx, Matrix<const S> dy, const Saved&, Gradients<S>&, Matrix<S> dx) const {
    if (!dx.data()) return;
    copy_rows(dy, dx);
    ops::rope_backward(ctx, dx, head_dim, angles.cos.template view<2>(), angles.sin.template view<2>());
  }
};

/// Causal attention over sequences one below another.
template <class B>
struct Causal {
  using S = ScalarOf<B>;
  using Saved = typename CausalAttention<B>::Saved;
  CausalAttention<B> attention;
  std::vector<SequenceRows<B>> sequences;
  Angles<S> angles;
  Causal(const AttentionConfig& config, const std::vector<std::int64_t>& lengths, std::int64_t rows) : attention(config), angles(rows, config.head_dim) {
    std::int64_t begin = 0;
    for (const std::int64_t n : lengths) {
      sequences.push_back({nullptr, begin, n});
      begin += n;
    }
  }
  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("", self.attention);
  }
  void prepare(Context<B>& ctx, DType format) { attention.prepare(ctx, format); }
  void forward(Context<B>& ctx, Matrix<const S> x, Matrix<S> y, Saved* saved) const {
    std::fill_n(y.data(), y.elements(), S(0));
    attention.forward(ctx, 0, x, sequences, angles.cos.template view<2>(), angles.sin.template view<2>(), y, saved);
  }
  void backward(Context<B>& ctx, Matrix<const S> dy, const Saved& saved, Gradients<S>& gradients, Matrix<S> dx) const {
    attention.backward(ctx, dy, saved, gradients, dx);
  }
};

template <class B>
struct Full {
  using S = ScalarOf<B>;
  using Saved = typename FullAttention<B>::Saved;
  FullAttention<B> attention;
  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("", self.attention);
  }
  void prepare(Context<B>& ctx, DType format) { attention.prepare(ctx, format); }
  void forward(Context<B>& ctx, Matrix<const S> x, Matrix<S> y, Saved* saved) const {
    std::fill_n(y.data(), y.elements(), S(0));
    attention.forward(ctx, dtype_of<S>, x, y, saved);
  }
  void backward(Context<B>& ctx, Matrix<const S> dy, const Saved& saved, Gradients<S>& gradients, Matrix<S> dx) const {
    attention.backward(ctx, dy, saved, gradients, dx);
  }
};

/// y = scale · Σ losses.
template <class B>
struct MeanLoss {
  using S = ScalarOf<B>;
  struct Saved {
    Matrix<S> dlogits;
  };
  std::vector<std::int32_t> targets;
  double scale;
  template <class V, class Self>
  static void fields(V&&, Self&) {}
  void forward(Context<B>& ctx, Matrix<const S> x, Matrix<S> y, Saved* saved) const {
    const Arena::Scope scope(ctx.arena);
    const Vector<S> losses(ctx.arena.template take<S>(x.extent(0)), {x.extent(0)});
    const Matrix<S> dlogits = saved ? ctx.storage(true).template matrix<S>(x.extent(0), x.extent(1)) : Matrix<S>{};
    ops::cross_entropy(ctx, x, targets, scale, losses, dlogits);
    y(0, 0) = S(0);
    for (std::int64_t i = 0; i < losses.extent(0); ++i) y(0, 0) += static_cast<S>(scale) * losses(i);
    if (saved) saved->dlogits = dlogits;
  }
  void backward(Context<B>&, Matrix<const S> dy, const Saved& saved, Gradients<S>&, Matrix<S> dx) const {
    for (std::int64_t i = 0; i < dx.extent(0); ++i)
      for (std::int64_t j = 0; j < dx.extent(1); ++j) dx(i, j) = dy(0, 0) * saved.dlogits(i, j);
  }
};

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
inline std::int64_t sum(const std::vector<std::int64_t>& lengths) {
  std::int64_t n = 0;
  for (const std::int64_t l : lengths) n += l;
  return n;
}

inline LlamaConfig small_decoder() {
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
  void prepare(Context<B>& ctx, DType format) { part.prepare(ctx, Precision{.weights = format}, {}); }
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
    block.forward(ctx, dtype_of<S>, y, saved);
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

inline ClipVisionConfig small_encoder() {
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

}  // namespace gradients
