// Probe: products, attention and rotary embedding of Cpu against Reference<double>.
#include <m2lm/core.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <vector>

namespace {

using m2lm::Cpu;
using m2lm::DType;
using m2lm::Matrix;
using m2lm::Reference;
using m2lm::Shape;
using m2lm::Tensor;

template <class B>
struct On {
  using S = m2lm::ScalarOf<B>;
  B backend{};
  m2lm::Arena arena;
  m2lm::Context<B> ctx{backend, arena};
  m2lm::Rng rng{5};

  Tensor<S> random(Shape shape) {
    Tensor<S> x(shape);
    for (S& v : x.span()) v = static_cast<S>(static_cast<float>(2 * rng.uniform() - 1));
    return x;
  }

  Tensor<S> linear() {
    const m2lm::AnyTensor w(random({40, 3000}));
    const Tensor<S> x = random({3, 3000});
    Tensor<S> y(Shape{3, 40});
    m2lm::ops::linear(ctx, x.template view<2>(), m2lm::ops::pack(ctx, std::span(&w, 1), DType::f32), {}, y.template view<2>());
    return y;
  }

  Tensor<S> rope() {
    Tensor<S> x = random({9, 24});
    const Tensor<S> cos = random({9, 6}), sin = random({9, 6});
    m2lm::ops::rope(ctx, x.template view<2>(), 12, cos.template view<2>(), sin.template view<2>());
    return x;
  }

  /// 700 keys, more than a segment, written in two calls; the scores grow, so that the maximum moves from segment to segment.
  Tensor<S> attention() {
    constexpr std::int64_t heads = 4, kv_heads = 2, d = 8, keys = 700, tokens = 20;
    const m2lm::KeyValuesPlan plan = m2lm::ops::plan_key_values(ctx, DType::f32, kv_heads, d, keys);
    std::vector<std::byte> k_bytes(plan.bytes + 64), v_bytes(plan.bytes + 64);
    const m2lm::KeyValues kv{.format = DType::f32, .kv_heads = kv_heads, .head_dim = d, .capacity = plan.capacity, .keys = k_bytes.data(), .values = v_bytes.data()};
    Tensor<S> k = random({keys, kv_heads * d});
    const Tensor<S> v = random({keys, kv_heads * d}), q = random({tokens, heads * d});
    for (std::int64_t i = 0; i < k.elements(); ++i) k.data()[i] *= static_cast<S>(1 + i / (kv_heads * d) / 50);
    for (const std::int64_t begin : {std::int64_t{0}, keys - tokens}) {
      const std::int64_t end = begin == 0 ? keys - tokens : keys;
      m2lm::ops::append_key_values(ctx, Matrix<const S>(k.template view<2>().rows(begin, end)), Matrix<const S>(v.template view<2>().rows(begin, end)), begin, kv);
    }
    Tensor<S> y(Shape{tokens, heads * d});
    m2lm::ops::attention(ctx, q.template view<2>(), kv, keys, keys - tokens, {.causal = true}, 1.0, y.template view<2>());
    return y;
  }
};

template <class F>
void check(F&& f) {
  On<Cpu> cpu;
  On<Reference<double>> reference;
  const Tensor<float> a = f(cpu);
  const Tensor<double> b = f(reference);
  double most = 0;
  for (std::int64_t i = 0; i < a.elements(); ++i) most = std::max(most, std::abs(static_cast<double>(a.data()[i]) - b.data()[i]));
  CHECK(most < 1e-4);
}

}  // namespace

TEST_CASE("a product of several k blocks") {
  check([](auto& on) { return on.linear(); });
}
TEST_CASE("rotary embedding of several rows") {
  check([](auto& on) { return on.rope(); });
}
TEST_CASE("grouped causal attention over several segments of keys") {
  check([](auto& on) { return on.attention(); });
}
