// The gradient of every layer against exact derivatives of its forward pass (dual numbers), at random shapes.
#include <m2lm/layers/attention.hpp>
#include <m2lm/layers/embedding.hpp>
#include <m2lm/layers/ffn.hpp>
#include <m2lm/layers/norm.hpp>
#include <m2lm/testing/gradient_check.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <string>
#include <vector>

namespace {

using namespace m2lm;
using m2lm::testing::gradient_check;
using m2lm::testing::GradientReport;

/// A size that is small most of the time.
std::int64_t size(Rng& rng, std::int64_t largest) { return 1 + static_cast<std::int64_t>(rng.next() % static_cast<std::uint64_t>(largest)); }
bool coin(Rng& rng) { return rng.next() % 2 == 0; }

#define CHECK_GRADIENT(report, ...)                                                   \
  do {                                                                                \
    const GradientReport r = (report);                                                \
    CHECK_MESSAGE(r.passed, r.string(), " with ", concat(__VA_ARGS__));               \
    CHECK(r.comparisons > 0);                                                         \
  } while (false)

constexpr Activation activations[] = {Activation::none, Activation::relu,      Activation::silu,
                                      Activation::gelu, Activation::gelu_tanh, Activation::quick_gelu};

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
    attention.forward(ctx, DType::f64, x, y, saved);
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
    for (std::int64_t i = 0; i < losses.extent(0); ++i) y(0, 0) += S(scale) * losses(i);
    if (saved) saved->dlogits = dlogits;
  }
  void backward(Context<B>&, Matrix<const S> dy, const Saved& saved, Gradients<S>&, Matrix<S> dx) const {
    for (std::int64_t i = 0; i < dx.extent(0); ++i)
      for (std::int64_t j = 0; j < dx.extent(1); ++j) dx(i, j) = dy(0, 0) * saved.dlogits(i, j);
  }
};

AttentionConfig random_attention(Rng& rng, bool grouped) {
  AttentionConfig c;
  c.hidden_size = size(rng, 9);
  c.kv_heads = size(rng, 3);
  c.heads = c.kv_heads * (grouped ? size(rng, 3) : 1);
  c.head_dim = 2 * size(rng, 4);
  c.qkv_bias = coin(rng);
  c.output_bias = coin(rng);
  return c;
}
std::string text(const AttentionConfig& c) {
  return concat("hidden ", c.hidden_size, ", heads ", c.heads, "/", c.kv_heads, " of ", c.head_dim, ", window ", c.window, ", bias ", c.qkv_bias, c.output_bias);
}

}  // namespace

TEST_CASE("linear") {
  Rng rng(1);
  for (int trial = 0; trial < 12; ++trial) {
    const std::int64_t m = size(rng, 7), k = size(rng, 9), n = size(rng, 9);
    const bool bias = coin(rng);
    CHECK_GRADIENT(gradient_check([&]<class B>() { return Linear<B>(k, n, bias); }, Shape{m, k}, Shape{m, n}), "m=", m, " k=", k, " n=", n, " bias=", bias);
  }
}

TEST_CASE("the weight of a convolution") {
  CHECK_GRADIENT(gradient_check([]<class B>() { return Linear<B>(Shape{5, 3, 2, 2}, true); }, Shape{4, 12}, Shape{4, 5}), "a patch embedding");
}

TEST_CASE("embedding") {
  const auto make = []<class B>() { return Lookup<B>{Embedding<B>(6, 3), {4, 0, 4, 5, 4}}; };  // one row three times, one never
  CHECK_GRADIENT(gradient_check(make, Shape{0, 0}, Shape{5, 3}), "repeated ids");
}

TEST_CASE("norms") {
  Rng rng(2);
  for (int trial = 0; trial < 12; ++trial) {
    const std::int64_t m = size(rng, 6), n = trial == 0 ? 1 : size(rng, 12);
    const double eps = coin(rng) ? 1e-5 : 0.1;
    CHECK_GRADIENT(gradient_check([&]<class B>() { return RmsNorm<B>(n, eps); }, Shape{m, n}, Shape{m, n}), "rms m=", m, " n=", n, " eps=", eps);
    CHECK_GRADIENT(gradient_check([&]<class B>() { return LayerNorm<B>(n, eps); }, Shape{m, n}, Shape{m, n}), "layer m=", m, " n=", n, " eps=", eps);
  }
}

TEST_CASE("rope") {
  Rng rng(3);
  for (int trial = 0; trial < 6; ++trial) {
    const std::int64_t m = size(rng, 6), d = 2 * size(rng, 5), heads = size(rng, 3);
    const auto make = [&]<class B>() { return Rotation<B>{d, Angles<ScalarOf<B>>(m, d)}; };
    CHECK_GRADIENT(gradient_check(make, Shape{m, heads * d}, Shape{m, heads * d}), "rows ", m, ", heads ", heads, " of ", d);
  }
}

TEST_CASE("causal attention: groups, windows, ragged batches") {
  Rng rng(4);
  for (int trial = 0; trial < 14; ++trial) {
    AttentionConfig config = random_attention(rng, true);
    if (trial % 2 == 1) config.window = size(rng, 4);
    std::vector<std::int64_t> lengths;
    std::int64_t rows = 0;
    for (std::int64_t i = size(rng, 3); i > 0; --i) {
      lengths.push_back(trial == 0 ? 1 : size(rng, 7));
      rows += lengths.back();
    }
    const auto make = [&]<class B>() { return Causal<B>(config, lengths, rows); };
    CHECK_GRADIENT(gradient_check(make, Shape{rows, config.hidden_size}, Shape{rows, config.hidden_size}, {.seed = 40 + rng.next()}), text(config), ", ",
                   lengths.size(), " sequences, ", rows, " rows");
  }
}

TEST_CASE("full attention") {
  Rng rng(5);
  for (int trial = 0; trial < 10; ++trial) {
    const AttentionConfig config = random_attention(rng, trial % 3 == 2);
    const std::int64_t rows = size(rng, 7);
    const auto make = [&]<class B>() { return Full<B>{FullAttention<B>(config)}; };
    CHECK_GRADIENT(gradient_check(make, Shape{rows, config.hidden_size}, Shape{rows, config.hidden_size}), text(config), ", ", rows, " rows");
  }
}

TEST_CASE("large scores: the gradient of a softmax that is nearly one-hot") {
  const AttentionConfig config{.hidden_size = 6, .heads = 2, .kv_heads = 1, .head_dim = 4};
  const auto make = [&]<class B>() { return Causal<B>(config, {6}, 6); };
  CHECK_GRADIENT(gradient_check(make, Shape{6, 6}, Shape{6, 6}, {.input_scale = 6}), text(config));
}

TEST_CASE("feed-forward layers, every activation") {
  Rng rng(6);
  for (const Activation activation : activations)
    for (int trial = 0; trial < 3; ++trial) {
      const std::int64_t m = size(rng, 5), k = size(rng, 7), inner = size(rng, 9);
      const bool bias = coin(rng);
      const std::string label = concat("activation ", static_cast<int>(activation), " m=", m, " k=", k, " inner=", inner, " bias=", bias);
      CHECK_GRADIENT(gradient_check([&]<class B>() { return Added<GatedMlp<B>, B>{GatedMlp<B>(k, inner, bias, activation)}; }, Shape{m, k}, Shape{m, k}), "gated, ",
                     label);
      CHECK_GRADIENT(gradient_check([&]<class B>() { return Added<Mlp<B>, B>{Mlp<B>(k, inner, activation)}; }, Shape{m, k}, Shape{m, k}), "plain, ", label);
    }
}

TEST_CASE("cross-entropy with ignored targets") {
  Rng rng(7);
  for (int trial = 0; trial < 8; ++trial) {
    const std::int64_t rows = size(rng, 6), vocabulary = size(rng, 9);
    std::vector<std::int32_t> targets;
    for (std::int64_t i = 0; i < rows; ++i)
      targets.push_back(i > 0 && coin(rng) ? ignored_target : static_cast<std::int32_t>(rng.next() % static_cast<std::uint64_t>(vocabulary)));
    if (trial == 1) targets.assign(targets.size(), ignored_target);
    const double scale = trial == 1 ? 1.0 : 1.0 / static_cast<double>(counted_targets(targets));
    const auto make = [&]<class B>() { return MeanLoss<B>{targets, scale}; };
    CHECK_GRADIENT(gradient_check(make, Shape{rows, vocabulary}, Shape{1, 1}, {.input_scale = trial == 2 ? 300.0 : 2.0}), rows, " rows of ", vocabulary);
  }
  Reference<double> backend;
  Arena arena;
  Context<Reference<double>> ctx{backend, arena};
  const Tensor<double> logits(Shape{1, 4});
  Tensor<double> losses(Shape{1});
  const auto loss = [&](std::int32_t target) {
    ops::cross_entropy(ctx, logits.view<2>(), std::vector<std::int32_t>{target}, 1.0, losses.view<1>(), Matrix<double>{});
    return losses.data()[0];
  };
  CHECK(std::abs(loss(3) - std::log(4.0)) < 1e-15);
  CHECK(loss(ignored_target) == 0);
  CHECK_THROWS_AS(loss(4), InputError);
  CHECK_THROWS_AS(loss(-1), InputError);
}
