// The key/value layout and attention: Cpu at every level and format, and Reference<float>, against Reference<double>.
//
// The bound on an output, with u = 2^-24, u' = 2^-8 where the kernels round q and p to bf16 and 0 elsewhere, head_dim d, K keys.
// k and v are rounded to the cache's format before both computations, so they are exact in both.
//   s_j = scale·q·k_j   |δs_j| ≤ ((2d + 4)·u + u')·scale·Σ|q|·|k_j| =: at most E over the keys that the query sees
//   p_j = exp(s_j - m)  relative: e^(δs_j) from the argument, |s_j - m|·u ≤ 2·max|s|·u from the subtraction (the kernels subtract
//                       log2(e)·s in base 2, whose effect on p is the same), w from exp: 4u, and where p is rounded to bf16 the 2^-18.4 of
//                       the shorter polynomial, at most 56u; per segment of 512 keys 3 roundings of the merge and two more factors that
//                       are powers: P = E + (2·max|s|·u + w + (3u + 2w)·segments)
//   y = Σ p·v / Σ p     numerator and denominator each carry e^P, K additions, p its u':
//                       |δy| ≤ (e^(2P)·(1 + (3K + 8)·u + u') - 1)·Y, Y = Σ p·|v| / Σ p, which the oracle gives for |v|
// and 2^-100 for keys whose probability underflows.
#include <doctest/doctest.h>

#include <m2lm/core.hpp>

#include "ops_support.hpp"

#include <bit>

namespace {

using namespace m2lm_test;

struct Problem {
  std::int64_t tokens = 1, kv_heads = 1, group = 1, head_dim = 1, keys = 1, first = 0, capacity = 1, extra = 0;
  AttentionMask mask{};
  double scale = 1;
  Sinks sinks{};

  std::int64_t heads() const { return kv_heads * group; }
  std::string string() const {
    return concat("tokens=", tokens, " kv_heads=", kv_heads, " group=", group, " head_dim=", head_dim, " keys=", keys, " first=", first,
                  " capacity=", capacity, " extra=", extra, " causal=", mask.causal, " window=", mask.window, " scale=", scale,
                  sinks.zero_logit ? " with a sink" : "");
  }
};

struct Data {
  Tensor<float> q, k, v;
  Data(const Problem& p, DType format, Random& random)
      : q(random_tensor<float>(random, Shape{p.tokens, p.heads() * p.head_dim}, DType::f32, 1.5)),
        k(random_tensor<float>(random, Shape{p.keys, p.kv_heads * p.head_dim}, format)),
        v(random_tensor<float>(random, Shape{p.keys, p.kv_heads * p.head_dim}, format)) {}
};

template <class B>
void attend(Runner<B>& runner, const Problem& p, DType format, Matrix<const ScalarOf<B>> q, Matrix<const ScalarOf<B>> k, Matrix<const ScalarOf<B>> v,
            Matrix<ScalarOf<B>> y) {
  Cache<B> cache(runner.ctx, format, p.kv_heads, p.head_dim, p.capacity);
  ops::append_key_values(runner.ctx, k, v, 0, cache.kv);
  ops::attention(runner.ctx, q, cache.kv, p.keys, p.first, p.mask, p.scale, y, p.sinks);
}

struct Expected {
  Tensor<double> value, bound_f32, bound_rounded;
};

Expected expected(const Problem& p, const Data& data) {
  Runner<Reference<double>> reference;
  const Tensor<double> q = converted<double>(data.q), k = converted<double>(data.k), v = converted<double>(data.v);
  Tensor<double> magnitude = v.clone();
  for (double& x : magnitude.span()) x = std::abs(x);
  Expected e{Tensor<double>(q.shape()), Tensor<double>(q.shape()), Tensor<double>(q.shape())};
  attend(reference, p, DType::f32, matrix(q), matrix(k), matrix(v), e.value.view<2>());
  attend(reference, p, DType::f32, matrix(q), matrix(k), matrix(magnitude), e.bound_f32.view<2>());

  const std::int64_t d = p.head_dim;
  for (std::int64_t t = 0; t < p.tokens; ++t)
    for (std::int64_t h = 0; h < p.heads(); ++h) {
      double largest_sum = 0, largest_score = 0;
      for (std::int64_t j = 0; j < p.keys; ++j) {
        const std::int64_t position = p.first + t;
        if ((p.mask.causal || p.mask.window > 0) && j > position) continue;
        if (p.mask.window > 0 && j <= position - p.mask.window) continue;
        double sum = 0, score = 0;
        for (std::int64_t c = 0; c < d; ++c) {
          const double term = q.data()[t * p.heads() * d + h * d + c] * k.data()[j * p.kv_heads * d + h / p.group * d + c];
          sum += std::abs(term);
          score += term;
        }
        largest_sum = std::max(largest_sum, std::abs(p.scale) * sum);
        largest_score = std::max(largest_score, std::abs(p.scale * score));
      }
      const double segments = static_cast<double>(p.keys) / static_cast<double>(detail::key_segment) + 1;
      const auto relative = [&](double rounding) {
        const double scores = ((2 * static_cast<double>(d) + 4) * u32 + rounding) * largest_sum;
        const double power = rounding > 0 ? 56 * u32 : 4 * u32;
        const double each = scores + 2 * largest_score * u32 + power + (3 * u32 + 2 * power) * segments;
        return std::exp(2 * each) * (1 + (3 * static_cast<double>(p.keys) + 8) * u32 + rounding) - 1;
      };
      for (std::int64_t c = 0; c < d; ++c) {
        const std::int64_t at = t * p.heads() * d + h * d + c;
        e.bound_rounded.data()[at] = relative(u16) * e.bound_f32.data()[at] + 0x1.0p-100;
        e.bound_f32.data()[at] = relative(0) * e.bound_f32.data()[at] + 0x1.0p-100;
      }
    }
  return e;
}

template <class B>
void check(Runner<B>& runner, const Problem& p, const Data& data, DType format, const Expected& e, const Tensor<double>& bound, const std::string& name) {
  using S = ScalarOf<B>;
  const S nan = std::numeric_limits<S>::quiet_NaN();
  Strided<S> q(converted<S>(data.q), p.extra, nan), k(converted<S>(data.k), p.extra, nan), v(converted<S>(data.v), p.extra, nan),
      y(p.tokens, p.heads() * p.head_dim, p.extra, S(-77));
  attend<B>(runner, p, format, q.view(), k.view(), v.view(), y.view());
  Worst worst;
  const std::int64_t columns = p.heads() * p.head_dim;
  for (std::int64_t i = 0; i < p.tokens; ++i)
    for (std::int64_t j = 0; j < columns; ++j)
      worst.add(static_cast<double>(y.view()(i, j)), e.value.data()[i * columns + j], bound.data()[i * columns + j], i, j);
  CHECK_MESSAGE(worst.passed(), name, " ", p.string(), " at ", worst.where());
  CHECK_MESSAGE(y.gaps_untouched(), name, " ", p.string(), ": wrote between the rows of y");
}

void check_everywhere(const Problem& p, std::uint64_t seed) {
  for (const DType format : formats) {
    Random random(seed);
    const Data data(p, format, random);
    const Expected e = expected(p, data);
    for (const Variant& variant : variants(format)) {
      Runner<Cpu> cpu(Cpu(variant.options(2)));
      check(cpu, p, data, format, e, rounds_activations(cpu.backend, format) ? e.bound_rounded : e.bound_f32, label(variant, format));
    }
    Runner<Reference<float>> reference;
    check(reference, p, data, format, e, e.bound_f32, "Reference<float>");
  }
}

Problem random_problem(Random& random) {
  Problem p;
  static constexpr std::int64_t dims[] = {1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 48, 64, 65, 80, 96, 128, 129};
  p.head_dim = dims[static_cast<std::size_t>(random.integer(0, std::size(dims) - 1))];
  const std::int64_t kind = random.integer(0, 2);  // all heads apart, grouped, one key/value head
  p.kv_heads = kind == 2 ? 1 : random.integer(1, 3);
  p.group = kind == 0 ? 1 : random.integer(2, 5);
  p.keys = random.size(300) + detail::key_segment * (random.coin() ? 0 : random.integer(0, 2));
  p.tokens = std::min(p.keys, random.size(65));
  const std::int64_t mask = random.integer(0, 2);
  p.mask.causal = mask >= 1;
  if (mask == 2) p.mask.window = random.size(200) + (random.coin() ? 0 : detail::key_segment);
  // Causal queries may end anywhere; keys behind them are hidden.
  p.first = p.mask.causal ? random.integer(0, p.keys - p.tokens) : 0;
  p.capacity = p.keys + random.integer(0, 40);
  p.extra = random.coin() ? random.integer(1, 9) : 0;
  p.scale = 1 / std::sqrt(static_cast<double>(p.head_dim));
  p.sinks.zero_logit = random.integer(0, 2) == 0;
  return p;
}

TEST_CASE("attention: random shapes, masks, groups and strides") {
  Random random(401);
  for (int trial = 0; trial < 60; ++trial) check_everywhere(random_problem(random), 4000 + static_cast<std::uint64_t>(trial));
}

TEST_CASE("attention: chosen shapes") {
  const AttentionMask none{}, causal{.causal = true, .window = 0};
  SUBCASE("no query") { check_everywhere({.tokens = 0, .head_dim = 16, .keys = 5, .capacity = 8}, 1); }
  SUBCASE("one key") { check_everywhere({.tokens = 3, .kv_heads = 2, .head_dim = 64, .keys = 1, .capacity = 1, .mask = none, .scale = 0.125}, 2); }
  SUBCASE("a window of one key") {
    check_everywhere({.tokens = 40, .head_dim = 8, .keys = 200, .first = 150, .capacity = 200, .mask = {.causal = true, .window = 1}}, 3);
  }
  SUBCASE("a window that is causal without saying so") {
    check_everywhere({.tokens = 140, .group = 2, .head_dim = 16, .keys = 140, .capacity = 140, .mask = {.causal = false, .window = 129}}, 4);
  }
  SUBCASE("decoding after a long context") {
    check_everywhere({.tokens = 1, .kv_heads = 2, .group = 4, .head_dim = 64, .keys = 1030, .first = 1029, .capacity = 1100, .mask = causal, .scale = 0.125}, 5);
  }
  SUBCASE("head_dim larger than every buffer's default") {
    check_everywhere({.tokens = 5, .kv_heads = 1, .group = 2, .head_dim = 3333, .keys = 40, .first = 30, .capacity = 64, .mask = causal, .scale = 0.02}, 6);
  }
  SUBCASE("more than a tile of rows of one group") {
    check_everywhere({.tokens = 3, .kv_heads = 1, .group = 71, .head_dim = 24, .keys = 130, .first = 127, .capacity = 130, .mask = causal, .scale = 0.2}, 7);
  }
}

TEST_CASE("attention: a sink is a key of zeros with a value of zeros, and alone it gives zero") {
  Random random(403);
  Problem p{.tokens = 7, .kv_heads = 2, .group = 2, .head_dim = 5, .keys = 20, .capacity = 21, .scale = 0.4};
  const Data data(p, DType::f32, random);
  Runner<Reference<double>> reference;
  const Tensor<double> q = converted<double>(data.q), k = converted<double>(data.k), v = converted<double>(data.v);
  Tensor<double> longer_k(Shape{21, 10}), longer_v(Shape{21, 10}), with_row(Shape{7, 20}), with_sink(Shape{7, 20});
  std::copy_n(k.data(), k.elements(), longer_k.data());
  std::copy_n(v.data(), v.elements(), longer_v.data());
  p.keys = 21;
  attend(reference, p, DType::f32, matrix(q), matrix(longer_k), matrix(longer_v), with_row.view<2>());
  p.keys = 20;
  p.sinks.zero_logit = true;
  attend(reference, p, DType::f32, matrix(q), matrix(k), matrix(v), with_sink.view<2>());
  for (std::int64_t i = 0; i < 140; ++i) CHECK(with_sink.data()[i] == doctest::Approx(with_row.data()[i]).epsilon(1e-14));

  const auto nothing_seen = [&]<class B>(Runner<B> runner, DType format) {
    using S = ScalarOf<B>;
    Cache<B> cache(runner.ctx, format, 1, 4, 8);
    Tensor<S> one(Shape{1, 4}), y(Shape{1, 4});
    for (S& x : one.span()) x = S(3);
    for (S& x : y.span()) x = S(-77);
    ops::attention(runner.ctx, matrix(one), cache.kv, 0, 0, {}, 1.0, y.template view<2>(), Sinks{.zero_logit = true});
    for (const S x : y.span()) CHECK(x == S(0));
  };
  nothing_seen(Runner<Reference<double>>(), DType::f32);
  for (const DType format : formats)
    for (const Variant& variant : variants(format)) nothing_seen(Runner<Cpu>(Cpu(variant.options(1))), format);
}

TEST_CASE("attention: copied keys and values are the same, whatever the capacities") {
  Random random(404);
  for (int trial = 0; trial < 20; ++trial) {
    Problem p = random_problem(random);
    p.mask = {};
    p.first = 0;
    for (const DType format : formats) {
      Random data_random(6000 + static_cast<std::uint64_t>(trial));
      const Data data(p, format, data_random);
      const std::int64_t capacity = p.keys + random.integer(0, 70);
      const auto check_copy = [&]<class B>(Runner<B> runner, const std::string& name) {
        using S = ScalarOf<B>;
        const Tensor<S> q = converted<S>(data.q), k = converted<S>(data.k), v = converted<S>(data.v);
        Cache<B> from(runner.ctx, format, p.kv_heads, p.head_dim, p.capacity), to(runner.ctx, format, p.kv_heads, p.head_dim, capacity);
        ops::append_key_values(runner.ctx, matrix(k), matrix(v), 0, from.kv);
        ops::copy_key_values(runner.ctx, from.kv, p.keys, to.kv);
        Tensor<S> y(q.shape()), z(q.shape());
        ops::attention(runner.ctx, matrix(q), from.kv, p.keys, 0, {}, p.scale, y.template view<2>());
        ops::attention(runner.ctx, matrix(q), to.kv, p.keys, 0, {}, p.scale, z.template view<2>());
        CHECK_MESSAGE(std::equal(y.data(), y.data() + y.elements(), z.data()), name, " ", p.string(), " into ", capacity);
      };
      check_copy(Runner<Reference<double>>(), "Reference");
      for (const Variant& variant : variants(format)) check_copy(Runner<Cpu>(Cpu(variant.options(1))), label(variant, format));
    }
  }
  Runner<Cpu> cpu(Cpu({.threads = 1}));
  Cache<Cpu> small(cpu.ctx, DType::f32, 1, 8, 10), other(cpu.ctx, DType::f32, 2, 8, 10);
  CHECK_THROWS_AS(ops::copy_key_values(cpu.ctx, small.kv, small.kv.capacity + 1, small.kv), CapacityError);
  CHECK_THROWS_AS(ops::copy_key_values(cpu.ctx, small.kv, 1, other.kv), ShapeError);
}

TEST_CASE("attention: powers are as exact as their polynomials") {
  // Key 0 has the largest score, 0, and the value 1, key 1 the score t and the value 0: y = 1/(1 + e^t), whatever p is rounded to for the
  // values. bf16 holds t and 1 exactly. δt ≤ 3u·|t|; then e^t counts with its share of 1 + e^t, and there are 3 more roundings.
  for (const DType format : formats)
    for (const Variant& variant : variants(format)) {
      Runner<Cpu> cpu(Cpu(variant.options(1)));
      const double power = rounds_activations(cpu.backend, format) ? 56 * u32 : 4 * u32;
      Tensor<float> k(Shape{2, 1}), v(Shape{2, 1}), q(Shape{1, 1}), y(Shape{1, 1});
      q.data()[0] = 1;
      v.data()[0] = 1;
      Worst worst;
      for (std::int64_t i = 0; i < 2000; ++i) {
        k.data()[1] = rounded(-0.011F * static_cast<float>(i), DType::bf16);
        Cache<Cpu> cache(cpu.ctx, format, 1, 1, 2);
        ops::append_key_values(cpu.ctx, matrix(k), matrix(v), 0, cache.kv);
        ops::attention(cpu.ctx, matrix(q), cache.kv, 2, 0, {}, 1.0, y.view<2>());
        const double t = static_cast<double>(k.data()[1]), e = std::exp(t), expected = 1 / (1 + e);
        // q·log2(e) is rounded with the other activations: then a difference of scores is only known to u16.
        const double argument = (rounds_activations(cpu.backend, format) ? u16 + 3 * u32 : 3 * u32) * -t;
        worst.add(static_cast<double>(y.data()[0]), expected, expected * (e * (std::exp(argument + power) - 1) + 3 * u32), i, 0);
      }
      CHECK_MESSAGE(worst.passed(), label(variant, format), " at ", worst.where());
    }
}

TEST_CASE("attention: what no query of a tile sees is not read") {
  // NaN in whole panels before the window and behind the last query.
  const Problem p{.tokens = 40, .kv_heads = 2, .group = 3, .head_dim = 24, .keys = 1300, .first = 1100, .capacity = 1300, .mask = {.causal = true, .window = 100}, .scale = 0.2};
  Random random(407);
  for (const DType format : formats) {
    const Data data(p, format, random);
    Tensor<float> k = data.k.clone(), v = data.v.clone();
    for (std::int64_t j = 0; j < p.keys; ++j)
      if (j < 992 || j >= 1152)
        for (std::int64_t c = 0; c < 48; ++c) k.data()[j * 48 + c] = v.data()[j * 48 + c] = std::numeric_limits<float>::quiet_NaN();
    for (const Variant& variant : variants(format))
      for (const int threads : {1, 2}) {
        Runner<Cpu> cpu(Cpu(variant.options(threads)));
        Tensor<float> y(data.q.shape()), z(data.q.shape());
        attend(cpu, p, format, matrix(data.q), matrix(data.k), matrix(data.v), y.view<2>());
        attend(cpu, p, format, matrix(data.q), matrix(k), matrix(v), z.view<2>());
        CHECK_MESSAGE(same_bits(matrix(y), matrix(z)), label(variant, format), ", ", threads, " threads");
      }
  }
}

TEST_CASE("key/value layout: every number is stored as to_bf16 rounds it, in its place, at every level") {
  using detail::panel_width;
  Random random(409);
  for (const std::int64_t d : {1, 5, 31, 64, 80, 131, 300}) {
    constexpr std::int64_t keys = 75, heads = 2;
    Tensor<float> k(Shape{keys, heads * d}), v(Shape{keys, heads * d});
    for (Tensor<float>* t : {&k, &v})
      for (float& x : t->span()) {  // any bits: ties, infinities, NaN, subnormal numbers
        const std::uint32_t special[] = {0x7f800000U, 0xff800000U, 0x7f800001U, 0xffffffffU, 0x3f808000U, 0x3f818000U, 1U, 0x7f7fffffU};
        x = std::bit_cast<float>(random.integer(0, 9) == 0 ? special[random.integer(0, 7)] : static_cast<std::uint32_t>(random.integer(0, 0xffffffff)));
      }
    for (const DType format : formats)
      for (const Variant& variant : variants(format)) {
        Runner<Cpu> cpu(Cpu(variant.options(2)));
        Cache<Cpu> cache(cpu.ctx, format, heads, d, keys + 9);
        for (std::int64_t t = 0, count = 1; t < keys; t += count, count = std::min(keys - t, random.integer(1, 40)))
          ops::append_key_values(cpu.ctx, matrix(k).rows(t, t + count), matrix(v).rows(t, t + count), t, cache.kv);
        const std::int64_t pair = format == DType::bf16 ? 2 : 1, dk = detail::round_up(d, pair), dv = detail::round_up(d, panel_width);
        std::int64_t wrong = 0;
        const auto differs = [&](const std::vector<std::byte>& bytes, std::int64_t at, float x) {
          const std::byte* from = bytes.data() + at * static_cast<std::int64_t>(dtype_size(format));
          const Bf16 rounded_x = to_bf16(x);
          return std::memcmp(from, format == DType::bf16 ? static_cast<const void*>(&rounded_x) : &x, dtype_size(format)) != 0;
        };
        for (std::int64_t h = 0; h < heads; ++h)
          for (std::int64_t t = 0; t < keys; ++t)
            for (std::int64_t c = 0; c < d; ++c) {
              const std::int64_t at_key = h * cache.kv.capacity * dk + t / panel_width * panel_width * dk + c / pair * pair * panel_width + t % panel_width * pair + c % pair;
              const std::int64_t at_value = (h * dv + c / panel_width * panel_width) * cache.kv.capacity + t / pair * pair * panel_width + c % panel_width * pair + t % pair;
              wrong += differs(cache.keys, at_key, k.data()[t * heads * d + h * d + c]) ? 1 : 0;
              wrong += differs(cache.values, at_value, v.data()[t * heads * d + h * d + c]) ? 1 : 0;
            }
        CHECK_MESSAGE(wrong == 0, label(variant, format), ", head_dim ", d, ": ", wrong);
      }
  }
}

TEST_CASE("attention: scores far apart keep the softmax exact") {
  // One key wins by 200: the others' exp underflows to zero and nothing overflows; negative scores work the same way.
  for (const float sign : {1.0F, -1.0F})
    for (const DType format : formats)
      for (const Variant& variant : variants(format)) {
        Runner<Cpu> cpu(Cpu(variant.options(1)));
        Cache<Cpu> cache(cpu.ctx, format, 1, 1, 300);
        Tensor<float> k(Shape{300, 1}), v(Shape{300, 1}), q(Shape{1, 1}), y(Shape{1, 1});
        for (std::int64_t j = 0; j < 300; ++j) {
          k.data()[j] = (j == 200 ? 400.0F : 200.0F) * sign;
          v.data()[j] = static_cast<float>(j);
        }
        q.data()[0] = sign;
        ops::append_key_values(cpu.ctx, matrix(k), matrix(v), 0, cache.kv);
        ops::attention(cpu.ctx, matrix(q), cache.kv, 300, 0, {}, 1.0, y.view<2>());
        CHECK_MESSAGE(y.data()[0] == 200.0F, label(variant, format), ": ", y.data()[0]);
      }
}

TEST_CASE("attention: the bits do not depend on chunks, on keys behind, on stale rows or on threads") {
  Random random(402);
  for (int trial = 0; trial < 24; ++trial) {
    Problem p = random_problem(random);
    if (trial == 0) p = {.tokens = 300, .kv_heads = 2, .group = 3, .head_dim = 20, .keys = 300, .first = 0, .capacity = 300, .mask = {.causal = true, .window = 0}, .scale = 0.2};
    if (trial == 2) p = {.tokens = 5, .kv_heads = 1, .group = 8, .head_dim = 64, .keys = 1700, .first = 1695, .capacity = 2100, .mask = {.causal = true, .window = 0}, .scale = 0.2};
    if (trial == 3) p = {.tokens = 3, .kv_heads = 3, .group = 2, .head_dim = 40, .keys = 1600, .first = 1597, .capacity = 1600, .mask = {.causal = true, .window = 900}, .scale = 0.2, .sinks = {.zero_logit = true}};
    if (trial == 1) p = {.tokens = 300, .kv_heads = 1, .group = 1, .head_dim = 64, .keys = 300, .first = 0, .capacity = 300, .mask = {.causal = true, .window = 77}, .scale = 0.2};
    for (const DType format : formats) {
      Random data_random(5000 + static_cast<std::uint64_t>(trial));
      const Data data(p, format, data_random);
      const std::int64_t columns = p.heads() * p.head_dim;
      for (const Variant& variant : variants(format)) {
        Tensor<float> first(Shape{p.tokens, columns});
        for (const int threads : {1, 2, 3}) {
          Runner<Cpu> cpu(Cpu(variant.options(threads)));
          const auto run = [&](std::int64_t step, bool stale) {
            Tensor<float> y(Shape{p.tokens, columns});
            Cache<Cpu> cache(cpu.ctx, format, p.kv_heads, p.head_dim, p.capacity);
            if (stale) {  // what an earlier, longer conversation left behind
              Random noise(9);
              const Tensor<float> junk = random_tensor<float>(noise, Shape{cache.kv.capacity, p.kv_heads * p.head_dim}, DType::f32, 5);
              ops::append_key_values(cpu.ctx, matrix(junk), matrix(junk), 0, cache.kv);
            }
            std::int64_t stored = p.mask.causal ? 0 : p.keys;
            if (stored > 0) ops::append_key_values(cpu.ctx, matrix(data.k), matrix(data.v), 0, cache.kv);
            for (std::int64_t t = 0; t < p.tokens; t += step) {
              const std::int64_t end = std::min(p.tokens, t + step);
              // Causal: only what these queries can see is there yet.
              const std::int64_t keys = p.mask.causal ? p.first + end : p.keys;
              ops::append_key_values(cpu.ctx, matrix(data.k).rows(stored, keys), matrix(data.v).rows(stored, keys), stored, cache.kv);
              stored = keys;
              ops::attention(cpu.ctx, matrix(data.q).rows(t, end), cache.kv, keys, p.first + t, p.mask, p.scale, y.view<2>().rows(t, end), p.sinks);
            }
            return y;
          };
          const Tensor<float> all = run(std::max<std::int64_t>(1, p.tokens), false);
          if (threads == 1) first = all.clone();
          const std::string where = concat(label(variant, format), " ", threads, " threads, ", p.string());
          CHECK_MESSAGE(same_bits(matrix(all), matrix(first)), where, ": at once");
          CHECK_MESSAGE(same_bits(matrix(run(1, false)), matrix(first)), where, ": one by one");
          CHECK_MESSAGE(same_bits(matrix(run(1, true)), matrix(first)), where, ": one by one over stale rows");
          CHECK_MESSAGE(same_bits(matrix(run(random.integer(2, 40), false)), matrix(first)), where, ": in chunks");
          CHECK_MESSAGE(same_bits(matrix(run(std::max<std::int64_t>(1, p.tokens), true)), matrix(first)), where, ": at once over stale rows");
        }
      }
    }
  }
}

TEST_CASE("attention: a head's bits do not depend on the other heads") {
  Random random(403);
  const Problem p{.tokens = 30, .kv_heads = 3, .group = 4, .head_dim = 40, .keys = 140, .first = 110, .capacity = 140, .mask = {.causal = true, .window = 0}, .scale = 0.15};
  const Problem one{.tokens = 30, .kv_heads = 1, .group = 1, .head_dim = 40, .keys = 140, .first = 110, .capacity = 140, .mask = p.mask, .scale = p.scale};
  for (const DType format : formats) {
    const Data data(p, format, random);
    for (const Variant& variant : variants(format)) {
      Runner<Cpu> cpu(Cpu(variant.options(2)));
      Tensor<float> all(Shape{p.tokens, p.heads() * p.head_dim}), alone(Shape{p.tokens, p.head_dim});
      attend(cpu, p, format, matrix(data.q), matrix(data.k), matrix(data.v), all.view<2>());
      for (std::int64_t h = 0; h < p.heads(); ++h) {
        const std::int64_t kv = h / p.group * p.head_dim;
        attend<Cpu>(cpu, one, format, matrix(data.q).columns(h * p.head_dim, (h + 1) * p.head_dim), matrix(data.k).columns(kv, kv + p.head_dim),
                    matrix(data.v).columns(kv, kv + p.head_dim), alone.view<2>());
        CHECK_MESSAGE(same_bits<float>(matrix(alone), matrix(all).columns(h * p.head_dim, (h + 1) * p.head_dim)), label(variant, format), " head ", h);
      }
    }
  }
}

TEST_CASE("attention: never writes the whole score matrix") {
  // 4 heads × 600 queries × 4000 keys would be 38 MB of scores.
  Runner<Cpu> cpu(Cpu(CpuOptions{.threads = 2}));
  Cache<Cpu> cache(cpu.ctx, DType::bf16, 4, 16, 4000);
  const Tensor<float> kv(Shape{4000, 64}), q(Shape{600, 64});
  Tensor<float> y(Shape{600, 64});
  ops::append_key_values(cpu.ctx, matrix(kv), matrix(kv), 0, cache.kv);
  ops::attention(cpu.ctx, matrix(q), cache.kv, 4000, 0, {}, 1.0, y.view<2>());
  CHECK(cpu.arena.peak_bytes() < 1000000);
}

template <class E, class F>
bool throws_with(F&& f, std::initializer_list<const char*> pieces) {
  try {
    f();
  } catch (const E& error) {
    for (const char* piece : pieces)
      if (std::string(error.what()).find(piece) == std::string::npos) return false;
    return true;
  }
  return false;
}

TEST_CASE("attention: errors name both sides") {
  Runner<Cpu> cpu(Cpu(CpuOptions{.threads = 1}));
  Cache<Cpu> cache(cpu.ctx, DType::f32, 2, 8, 32);
  const Tensor<float> k16(Shape{3, 16}), k24(Shape{3, 24}), q24(Shape{3, 24}), q32(Shape{3, 32}), k40(Shape{40, 16});
  Tensor<float> y24(Shape{3, 24}), y32(Shape{3, 32});
  CHECK(throws_with<ShapeError>([&] { ops::append_key_values(cpu.ctx, matrix(k24), matrix(k24), 0, cache.kv); }, {"[3, 24]", "2 heads of 8"}));
  CHECK(throws_with<ShapeError>([&] { ops::append_key_values(cpu.ctx, matrix(k16), matrix(k24), 0, cache.kv); }, {"[3, 16]", "[3, 24]"}));
  CHECK(throws_with<CapacityError>([&] { ops::append_key_values(cpu.ctx, matrix(k40), matrix(k40), 0, cache.kv); }, {"0 to 40", "32"}));
  CHECK(throws_with<ShapeError>([&] { ops::attention(cpu.ctx, matrix(q24), cache.kv, 3, 0, {}, 1.0, y24.view<2>()); }, {"[3, 24]", "2 heads of 8"}));
  CHECK(throws_with<ShapeError>([&] { ops::attention(cpu.ctx, matrix(q32), cache.kv, 3, 0, {}, 1.0, y24.view<2>()); }, {"[3, 32]", "[3, 24]"}));
  CHECK(throws_with<ShapeError>([&] { ops::attention(cpu.ctx, matrix(q32), cache.kv, 33, 0, {}, 1.0, y32.view<2>()); }, {"33 keys of 32"}));
  CHECK(throws_with<ShapeError>([&] { ops::attention(cpu.ctx, matrix(q32), cache.kv, 3, 1, {.causal = true, .window = 0}, 1.0, y32.view<2>()); }, {"position 1", "3 keys"}));
  CHECK(throws_with<OptionError>([&] { ops::plan_key_values(cpu.ctx, DType::i8, 1, 8, 4); }, {"i8", "f32 or bf16"}));
  CHECK(throws_with<ShapeError>([&] { ops::plan_key_values(cpu.ctx, DType::f32, 0, 8, 4); }, {"0 heads of 8"}));
}

}  // namespace
