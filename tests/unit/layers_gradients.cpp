// The gradient of every layer against exact derivatives of its forward pass (dual numbers), at random shapes.
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "gradients_support.hpp"

namespace {

using namespace gradients;

/// A size that is small most of the time.
std::int64_t size(Rng& rng, std::int64_t largest) { return 1 + static_cast<std::int64_t>(rng.next() % static_cast<std::uint64_t>(largest)); }
bool coin(Rng& rng) { return rng.next() % 2 == 0; }

constexpr Activation activations[] = {Activation::none, Activation::relu,      Activation::silu,
                                      Activation::gelu, Activation::gelu_tanh, Activation::quick_gelu};

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
