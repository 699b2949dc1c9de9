// labels: narrow-sanitizer
// Backward passes on Cpu at every level, against Reference<double>; the same bits on any number of threads.
//
// Bounds, with u = 2^-24 and sums of K terms: a chain of K additions of rounded products is off by at most (2K + 2)·u·Σ|terms| (two
// roundings per product where there is no fused multiply-add). Errors of factors are carried through to first order; each test says
// how.
#include "ops_support.hpp"

#include <m2lm/ops/activation.hpp>
#include <m2lm/ops/loss.hpp>

#include <algorithm>
#include <limits>
#include <vector>

namespace {

using namespace m2lm_test;

double chain(std::int64_t terms) { return (2.0 * static_cast<double>(terms) + 2) * u32; }

/// |x| of every element.
Tensor<double> magnitude(const Tensor<float>& x) {
  Tensor<double> out(x.shape());
  for (std::int64_t i = 0; i < x.elements(); ++i) out.data()[i] = std::abs(static_cast<double>(x.data()[i]));
  return out;
}

template <class T>
Vector<T> vector_of(Tensor<T>& t) {
  return Vector<T>(t.data(), {t.elements()});
}

/// All of the matrix within its bounds, and nothing between its rows written.
void check(Strided<float>& got, const Tensor<double>& expected, const Tensor<double>& bound, const std::string& name) {
  Worst worst;
  const std::int64_t n = expected.shape()[1];
  for (std::int64_t i = 0; i < expected.shape()[0]; ++i)
    for (std::int64_t j = 0; j < n; ++j) worst.add(static_cast<double>(got.view()(i, j)), expected.data()[i * n + j], bound.data()[i * n + j], i, j);
  CHECK_MESSAGE(worst.passed(), name, " at ", worst.where());
  CHECK_MESSAGE(got.gaps_untouched(), name, ": wrote between the rows");
}

Strided<float> strided(const Tensor<float>& t, std::int64_t extra) { return Strided<float>(t, extra, 7777.0F); }
Matrix<const float> view(Strided<float>& s) { return s.view(); }

/// Runs `f(cpu, results)` on 1, 2 and 3 threads; the results must have the same bits. Returns those of two threads.
template <class F>
auto on_threads(const Variant& variant, F&& f) {
  auto first = f(Cpu(variant.options(1)));
  auto second = f(Cpu(variant.options(2)));
  auto third = f(Cpu(variant.options(3)));
  REQUIRE(first.size() == second.size());
  for (std::size_t i = 0; i < first.size(); ++i) {
    CHECK_MESSAGE(same_bits<float>(first[i].view(), second[i].view()), label(variant, DType::f32), ": 2 threads, result ", i);
    CHECK_MESSAGE(same_bits<float>(first[i].view(), third[i].view()), label(variant, DType::f32), ": 3 threads, result ", i);
  }
  return second;
}

AnyTensor any(const Tensor<float>& t) { return AnyTensor(t.clone()); }

TEST_CASE("the gradient of linear's input: every format and level, written or added") {
  Random random(401);
  for (int trial = 0; trial < 40; ++trial) {
    const std::int64_t m = trial == 0 ? 300 : random.size(65), n = trial == 1 ? 700 : random.size(129), k = trial == 2 ? 1000 : random.size(193), extra = random.integer(0, 5);
    const bool accumulate = random.coin();
    for (const DType format : weight_formats) {
      const Tensor<float> dy = random_tensor<float>(random, Shape{m, n}), before = random_tensor<float>(random, Shape{m, k});
      const Tensor<float> w = random_tensor<float>(random, Shape{n, k}, format);
      Runner<Reference<double>> reference;
      const auto run = [&](const Tensor<double>& a, const Tensor<double>& b, Tensor<double> c) {
        const AnyTensor weight(b.clone());
        ops::linear_input_gradient(reference.ctx, matrix(a), ops::pack(reference.ctx, std::span(&weight, 1), format), c.template view<2>(), accumulate);
        return c;
      };
      const Tensor<double> expected = run(converted<double>(dy), converted<double>(w), converted<double>(before));
      Tensor<double> bound = run(magnitude(dy), magnitude(w), magnitude(before));
      for (double& b : bound.span()) b *= chain(n + 1);
      for (const Variant& variant : variants(format)) {
        auto got = on_threads(variant, [&](Cpu backend) {
          Runner<Cpu> cpu(backend);
          const AnyTensor weight = any(w);
          const PackedMatrix packed = ops::pack(cpu.ctx, std::span(&weight, 1), format);
          Strided<float> x = strided(dy, extra), dx = accumulate ? strided(before, extra) : Strided<float>(m, k, extra, 7777.0F);
          ops::linear_input_gradient(cpu.ctx, view(x), packed, dx.view(), accumulate);
          std::vector<Strided<float>> out;
          out.push_back(std::move(dx));
          return out;
        });
        check(got[0], expected, bound, concat(label(variant, format), " m=", m, " n=", n, " k=", k, " accumulate=", accumulate));
      }
    }
  }
}

TEST_CASE("the gradients of linear's weight and bias are added") {
  Random random(402);
  for (int trial = 0; trial < 40; ++trial) {
    const std::int64_t m = trial == 0 ? 1500 : random.size(129), n = trial == 1 ? 500 : random.size(129), k = trial == 2 ? 800 : random.size(193),
                       extra = random.integer(0, 5);
    const int parts = static_cast<int>(random.integer(0, 5));  // 0: the weight alone, 1: the bias alone, else both
    const Tensor<float> dy = random_tensor<float>(random, Shape{m, n}), x = random_tensor<float>(random, Shape{m, k});
    const Tensor<float> dw0 = random_tensor<float>(random, Shape{n, k}), db0 = random_tensor<float>(random, Shape{1, n});
    Runner<Reference<double>> reference;
    const auto run = [&](const Tensor<double>& a, const Tensor<double>& b, Tensor<double> dw, Tensor<double> db) {
      ops::linear_weight_gradient(reference.ctx, matrix(a), matrix(b), parts == 1 ? Matrix<double>{} : dw.template view<2>(),
                                  parts == 0 ? Vector<double>{} : vector_of(db));
      return std::pair{std::move(dw), std::move(db)};
    };
    const auto expected = run(converted<double>(x), converted<double>(dy), converted<double>(dw0), converted<double>(db0));
    auto bound = run(magnitude(x), magnitude(dy), magnitude(dw0), magnitude(db0));
    for (double& b : bound.first.span()) b *= chain(m + 1);
    for (double& b : bound.second.span()) b *= chain(m + 1);
    for (const Variant& variant : variants(DType::f32)) {
      auto got = on_threads(variant, [&](Cpu backend) {
        Runner<Cpu> cpu(backend);
        Strided<float> dw = strided(dw0, 0), db = strided(db0, 0), a = strided(x, extra), b = strided(dy, extra + 1);
        ops::linear_weight_gradient(cpu.ctx, view(a), view(b), parts == 1 ? Matrix<float>{} : dw.view(),
                                    parts == 0 ? Vector<float>{} : Vector<float>(db.view().data(), {n}));
        std::vector<Strided<float>> out;
        out.push_back(std::move(dw));
        out.push_back(std::move(db));
        return out;
      });
      const std::string name = concat(label(variant, DType::f32), " m=", m, " n=", n, " k=", k, " parts=", parts);
      check(got[0], expected.first, bound.first, name + " weight");
      check(got[1], expected.second, bound.second, name + " bias");
    }
  }
}

constexpr std::array<Activation, 6> activations{Activation::none,      Activation::relu,       Activation::silu, Activation::gelu,
                                                Activation::gelu_tanh, Activation::quick_gelu};

TEST_CASE("activations and their slopes, alone and gated, in place") {
  // f is off by 16·u·|a| (see ops_linear.cpp). f' is a sum of a sigmoid or an error function (6 roundings of at most 1, erf's own 1.5e-7 =
  // 2.5 u) and of a·s(1-s)·c, where |a|·s·(1-s)·c < 1: 16 roundings, and the argument's, which grow with |a|.
  Random random(403);
  for (const Activation activation : activations)
    for (const bool gated : {false, true})
      for (const std::int64_t n : {1, 5, 16, 33, 100}) {
        const std::int64_t m = 7, wide = gated ? 2 * n : n;
        const Tensor<float> dy = random_tensor<float>(random, Shape{m, n}), z = random_tensor<float>(random, Shape{m, wide}, DType::f32, 4);
        Runner<Reference<double>> reference;
        Tensor<double> y(Shape{m, n}), dz(Shape{m, wide}), y_bound(Shape{m, n}), dz_bound(Shape{m, wide});
        ops::activation_forward(reference.ctx, matrix(converted<double>(z)), activation, y.view<2>());
        ops::activation_backward(reference.ctx, matrix(converted<double>(dy)), matrix(converted<double>(z)), activation, dz.view<2>());
        for (std::int64_t i = 0; i < m; ++i)
          for (std::int64_t j = 0; j < n; ++j) {
            const double a = std::abs(static_cast<double>(z.data()[i * wide + j])), b = gated ? std::abs(static_cast<double>(z.data()[i * wide + n + j])) : 1;
            const double d = std::abs(static_cast<double>(dy.data()[i * n + j]));
            y_bound.data()[i * n + j] = 18 * u32 * a * b;
            dz_bound.data()[i * wide + j] = 24 * u32 * (1 + a) * d * b;
            if (gated) dz_bound.data()[i * wide + n + j] = 18 * u32 * a * d;
          }
        for (const Variant& variant : variants(DType::f32)) {
          const std::string name = concat(label(variant, DType::f32), " activation ", static_cast<int>(activation), " gated=", gated, " n=", n);
          Runner<Cpu> cpu(Cpu(variant.options(2)));
          Strided<float> zs = strided(z, 3), ds = strided(dy, 2), ys(m, n, 1, 7777.0F), dzs(m, wide, 2, 7777.0F);
          ops::activation_forward(cpu.ctx, view(zs), activation, ys.view());
          ops::activation_backward(cpu.ctx, view(ds), view(zs), activation, dzs.view());
          check(ys, y, y_bound, name + " forward");
          check(dzs, dz, dz_bound, name + " backward");
          Strided<float> in_place = strided(z, 3);
          ops::activation_backward(cpu.ctx, view(ds), view(in_place), activation, in_place.view());
          CHECK_MESSAGE(same_bits<float>(in_place.view(), dzs.view()), name, ": dz in place of z");
          if (!gated) {
            Strided<float> over = strided(dy, 2);
            ops::activation_backward(cpu.ctx, view(over), view(zs), activation, over.view());
            CHECK_MESSAGE(same_bits<float>(over.view(), dzs.view()), name, ": dz in place of dy");
          }
        }
      }
}

TEST_CASE("the gradients of the norms") {
  // To first order, with c = (x - mean)·r: r is off by a relative (n + 4)·u, the mean by chain(n)·mean|x|, so c by
  // e = chain(n)·(|c| + r·mean|x|) + 4u|c|. mean(g) and mean(g·c) are sums of n terms, the second with c's error in every term.
  Random random(404);
  for (int trial = 0; trial < 60; ++trial) {
    const std::int64_t m = trial == 0 ? 700 : random.size(40), n = random.size(200), extra = random.integer(0, 4);
    const bool centred = random.coin(), accumulate = random.coin();
    const int parts = static_cast<int>(random.integer(0, 4));  // 0: dx alone, 1: the parameters alone
    const double eps = 1e-5;
    const Tensor<float> x = random_tensor<float>(random, Shape{m, n}), dy = random_tensor<float>(random, Shape{m, n}), w = random_tensor<float>(random, Shape{1, n}),
                        dx0 = random_tensor<float>(random, Shape{m, n}), dw0 = random_tensor<float>(random, Shape{1, n}), db0 = random_tensor<float>(random, Shape{1, n});
    const auto run = [&]<class B>(Runner<B>& runner, auto xs, auto dys, auto ws, auto dx, auto dw, auto db) {
      using S = ScalarOf<B>;
      const Vector<const S> weight(ws.data(), {n});
      const auto dx_view = parts == 1 ? Matrix<S>{} : dx;
      const auto dw_view = parts == 0 ? Vector<S>{} : Vector<S>(dw.data(), {n});
      const auto db_view = parts == 0 ? Vector<S>{} : Vector<S>(db.data(), {n});
      if (centred)
        ops::layer_norm_backward(runner.ctx, dys, xs, weight, eps, dx_view, accumulate, dw_view, db_view);
      else
        ops::rms_norm_backward(runner.ctx, dys, xs, weight, eps, dx_view, accumulate, dw_view);
    };
    Runner<Reference<double>> reference;
    const Tensor<double> xd = converted<double>(x), dyd = converted<double>(dy), wd = converted<double>(w);
    Tensor<double> dx = converted<double>(dx0), dw = converted<double>(dw0), db = converted<double>(db0);
    run(reference, matrix(xd), matrix(dyd), matrix(wd), dx.view<2>(), dw.view<2>(), db.view<2>());
    Tensor<double> dx_bound(Shape{m, n}), dw_bound(Shape{1, n}), db_bound(Shape{1, n});
    const auto size = static_cast<double>(n);
    for (std::int64_t j = 0; j < n; ++j) {
      dw_bound.data()[j] = chain(m + 1) * std::abs(static_cast<double>(dw0.data()[j]));
      db_bound.data()[j] = chain(m + 1) * std::abs(static_cast<double>(db0.data()[j]));
    }
    for (std::int64_t i = 0; i < m; ++i) {
      const double* xr = xd.data() + i * n;
      const double* dr = dyd.data() + i * n;
      double mean = 0, mean_abs = 0, squares = 0, mean_g = 0, mean_gc = 0, mean_ge = 0;
      for (std::int64_t j = 0; j < n; ++j) {
        mean += centred ? xr[j] / size : 0;
        mean_abs += centred ? std::abs(xr[j]) / size : 0;
      }
      for (std::int64_t j = 0; j < n; ++j) squares += (xr[j] - mean) * (xr[j] - mean);
      const double r = 1 / std::sqrt(squares / size + eps);
      const auto c_of = [&](std::int64_t j) { return std::abs(xr[j] - mean) * r; };
      const auto e_of = [&](std::int64_t j) { return chain(n) * (c_of(j) + r * mean_abs) + 4 * u32 * c_of(j); };
      for (std::int64_t j = 0; j < n; ++j) {
        const double g = std::abs(dr[j] * wd.data()[j]);
        mean_g += centred ? g / size : 0;
        mean_gc += g * c_of(j) / size;
        mean_ge += g * e_of(j) / size;
      }
      for (std::int64_t j = 0; j < n; ++j) {
        const double g = std::abs(dr[j] * wd.data()[j]), c = c_of(j), e = e_of(j);
        const double terms = g + mean_g + c * mean_gc;
        dx_bound.data()[i * n + j] = r * (chain(n) * (terms + mean_g + c * mean_gc) + 6 * u32 * terms + e * mean_gc + c * mean_ge) +
                                     (accumulate ? 2 * u32 * std::abs(static_cast<double>(dx0.data()[i * n + j])) : 0) + u32 * r * terms;
        dw_bound.data()[j] += std::abs(dr[j]) * (chain(m + 1) * c + e);
        db_bound.data()[j] += std::abs(dr[j]) * chain(m + 1);
      }
    }
    for (const Variant& variant : variants(DType::f32)) {
      auto got = on_threads(variant, [&](Cpu backend) {
        Runner<Cpu> cpu(backend);
        std::vector<Strided<float>> out;
        out.push_back(accumulate || parts == 1 ? strided(dx0, extra) : Strided<float>(m, n, extra, 7777.0F));
        out.push_back(strided(dw0, 0));
        out.push_back(strided(db0, 0));
        Strided<float> xs = strided(x, extra), dys = strided(dy, extra + 1), ws = strided(w, 0);
        run(cpu, view(xs), view(dys), ws.view(), out[0].view(), out[1].view(), out[2].view());
        return out;
      });
      const std::string name = concat(label(variant, DType::f32), " m=", m, " n=", n, " centred=", centred, " accumulate=", accumulate, " parts=", parts);
      if (parts != 1) check(got[0], dx, dx_bound, name + " dx");
      check(got[1], dw, dw_bound, name + " dweight");
      if (centred) check(got[2], db, db_bound, name + " dbias");
    }
  }
}

TEST_CASE("the gradient of the rotation, and of gathered rows") {
  Random random(405);
  for (const std::int64_t head_dim : {2, 6, 10, 32, 66}) {
    const std::int64_t m = 9, heads = 3, n = heads * head_dim;
    const Tensor<float> dx = random_tensor<float>(random, Shape{m, n}), cos = random_tensor<float>(random, Shape{m, head_dim / 2}),
                        sin = random_tensor<float>(random, Shape{m, head_dim / 2});
    Runner<Reference<double>> reference;
    Tensor<double> expected = converted<double>(dx), bound(Shape{m, n});
    ops::rope_backward(reference.ctx, expected.view<2>(), head_dim, matrix(converted<double>(cos)), matrix(converted<double>(sin)));
    for (double& b : bound.span()) b = 4 * u32 * 2 * 3.5 * 3.5;  // two products of numbers below 3.5
    for (const Variant& variant : variants(DType::f32)) {
      Runner<Cpu> cpu(Cpu(variant.options(2)));
      Strided<float> x = strided(dx, 2), c = strided(cos, 1), s = strided(sin, 1);
      ops::rope_backward(cpu.ctx, x.view(), head_dim, view(c), view(s));
      check(x, expected, bound, concat(label(variant, DType::f32), " head_dim=", head_dim));
    }
  }
  const std::vector<std::int32_t> ids{4, 0, 4, 4, 2};
  const Tensor<float> rows = random_tensor<float>(random, Shape{5, 37}), table = random_tensor<float>(random, Shape{6, 37});
  Runner<Reference<double>> reference;
  Tensor<double> expected = converted<double>(table), bound(Shape{6, 37});
  ops::scatter_add_rows(reference.ctx, matrix(converted<double>(rows)), ids, expected.view<2>());
  for (double& b : bound.span()) b = 3 * u32 * 4 * 3.5;
  for (const Variant& variant : variants(DType::f32)) {
    Runner<Cpu> cpu(Cpu(variant.options(2)));
    Strided<float> r = strided(rows, 2), t = strided(table, 1);
    ops::scatter_add_rows(cpu.ctx, view(r), ids, t.view());
    check(t, expected, bound, label(variant, DType::f32) + " scatter");
  }
}

TEST_CASE("the gradient of attention: groups, masks, windows, odd sizes") {
  // To first order: a score is off by e_s = chain(d)·scale·Σ|q||k|, a probability by a relative e_p = 2·max e_s + (2·keys + 8)·u (exp to 2 ulp and
  // its argument's rounding), dP by chain(d)·Σ|dy||v|, and so on through dS = p·(dP - Σ p·dP)·scale.
  Random random(406);
  for (int trial = 0; trial < 30; ++trial) {
    const std::int64_t d = random.size(40), kv_heads = random.integer(1, 3), group = random.integer(1, 3), heads = kv_heads * group;
    const std::int64_t keys = trial == 0 ? 200 : random.size(70), extra = random.integer(0, 3);
    const AttentionMask mask{.causal = random.coin(), .window = random.integer(0, 2) == 0 ? random.integer(1, 40) : 0};
    const std::int64_t queries = keys;
    const double scale = 1 / std::sqrt(static_cast<double>(d));
    const Tensor<float> q = random_tensor<float>(random, Shape{queries, heads * d}), k = random_tensor<float>(random, Shape{keys, kv_heads * d}),
                        v = random_tensor<float>(random, Shape{keys, kv_heads * d}), dy = random_tensor<float>(random, Shape{queries, heads * d});
    const Tensor<double> qd = converted<double>(q), kd = converted<double>(k), vd = converted<double>(v), dyd = converted<double>(dy);
    Runner<Reference<double>> reference;
    Tensor<double> y(q.shape()), dq(q.shape()), dk(k.shape()), dv(k.shape()), dq_bound(q.shape()), dk_bound(k.shape()), dv_bound(k.shape());
    Cache<Reference<double>> cache(reference.ctx, DType::native, kv_heads, d, keys);
    ops::append_key_values(reference.ctx, matrix(kd), matrix(vd), 0, cache.kv);
    ops::attention(reference.ctx, matrix(qd), cache.kv, keys, 0, mask, scale, y.view<2>());
    ops::attention_backward(reference.ctx, matrix(qd), matrix(kd), matrix(vd), matrix(y), matrix(dyd), d, mask, scale, dq.view<2>(), dk.view<2>(), dv.view<2>());
    const auto count = static_cast<std::size_t>(keys);
    std::vector<double> p(count), dp(count), e_dp(count);
    for (std::int64_t h = 0; h < heads; ++h)
      for (std::int64_t t = 0; t < queries; ++t) {
        const std::int64_t begin = mask.window > 0 ? std::max<std::int64_t>(0, t - mask.window + 1) : 0, end = mask.causal || mask.window > 0 ? t + 1 : keys;
        double largest = -1e300, sum = 0, e_s = 0, mean = 0, e_mean = 0;
        const auto at = [&](std::int64_t j) { return static_cast<std::size_t>(j); };
        const auto row = [&](const Tensor<double>& x, std::int64_t r, std::int64_t head, std::int64_t all) { return x.data() + (r * all + head) * d; };
        for (std::int64_t j = begin; j < end; ++j) {
          double s = 0, size = 0, size_dp = 0;
          dp[at(j)] = 0;
          for (std::int64_t c = 0; c < d; ++c) {
            const double qk = row(qd, t, h, heads)[c] * row(kd, j, h / group, kv_heads)[c], dyv = row(dyd, t, h, heads)[c] * row(vd, j, h / group, kv_heads)[c];
            s += qk;
            size += std::abs(qk);
            dp[at(j)] += dyv;
            size_dp += std::abs(dyv);
          }
          p[at(j)] = s * scale;
          e_s = std::max(e_s, (chain(d) + 2 * u32) * scale * size);
          e_dp[at(j)] = chain(d) * size_dp;
          largest = std::max(largest, p[at(j)]);
        }
        for (std::int64_t j = begin; j < end; ++j) {
          p[at(j)] = std::exp(p[at(j)] - largest);
          sum += p[at(j)];
        }
        const double e_p = 2 * e_s + (2 * static_cast<double>(keys) + 8 + 2 * std::abs(largest)) * u32 + 20 * u32;
        for (std::int64_t j = begin; j < end; ++j) {
          p[at(j)] /= sum;
          mean += p[at(j)] * dp[at(j)];
          e_mean += p[at(j)] * (e_dp[at(j)] + std::abs(dp[at(j)]) * (e_p + chain(keys)));
        }
        for (std::int64_t j = begin; j < end; ++j) {
          const double ds = std::abs(p[at(j)] * (dp[at(j)] - mean) * scale);
          const double e_ds = scale * p[at(j)] * (e_dp[at(j)] + e_mean) + ds * (e_p + 4 * u32);
          const double terms = static_cast<double>(std::max(keys, queries * group));
          for (std::int64_t c = 0; c < d; ++c) {
            const double all = ds * (2 * terms + 4) * u32 + e_ds;
            dq_bound.data()[(t * heads + h) * d + c] += all * std::abs(row(kd, j, h / group, kv_heads)[c]);
            dk_bound.data()[(j * kv_heads + h / group) * d + c] += all * std::abs(row(qd, t, h, heads)[c]);
            dv_bound.data()[(j * kv_heads + h / group) * d + c] += p[at(j)] * (e_p + (2 * terms + 4) * u32) * std::abs(row(dyd, t, h, heads)[c]);
          }
        }
      }
    const Tensor<float> yf = converted<float>(y);
    for (const Variant& variant : variants(DType::f32)) {
      auto got = on_threads(variant, [&](Cpu backend) {
        Runner<Cpu> cpu(backend);
        std::vector<Strided<float>> out;
        out.push_back(Strided<float>(queries, heads * d, extra, 7777.0F));
        out.push_back(Strided<float>(keys, kv_heads * d, extra + 1, 7777.0F));
        out.push_back(Strided<float>(keys, kv_heads * d, extra, 7777.0F));
        Strided<float> qs = strided(q, extra), ks = strided(k, extra), vs = strided(v, extra + 2), ys = strided(yf, extra), dys = strided(dy, extra + 1);
        ops::attention_backward(cpu.ctx, view(qs), view(ks), view(vs), view(ys), view(dys), d, mask, scale, out[0].view(), out[1].view(), out[2].view());
        return out;
      });
      const std::string name = concat(label(variant, DType::f32), " d=", d, " heads=", heads, "/", kv_heads, " keys=", keys, " causal=", mask.causal, " window=", mask.window);
      check(got[0], dq, dq_bound, name + " dq");
      check(got[1], dk, dk_bound, name + " dk");
      check(got[2], dv, dv_bound, name + " dv");
    }
  }
}

TEST_CASE("cross-entropy: losses and gradients, ignored rows, in place") {
  // Σ exp is off by a relative chain(min(n, 1024)) + 8u and each exp by its argument's rounding u·|l - max|; the rest is f64.
  Random random(407);
  for (const std::int64_t n : {1, 3, 16, 100, 1025, 5000}) {
    const std::int64_t m = 6;
    const double scale = 0.37;
    Tensor<float> logits = random_tensor<float>(random, Shape{m, n}, DType::f32, 5);
    std::vector<std::int32_t> targets;
    for (std::int64_t i = 0; i < m; ++i) targets.push_back(i == 2 ? ignored_target : static_cast<std::int32_t>(random.integer(0, n - 1)));
    logits.data()[0] = 300;  // exp overflows unless the largest is taken off
    Runner<Reference<double>> reference;
    Tensor<double> losses(Shape{m, 1}), d(Shape{m, n}), losses_bound(Shape{m, 1}), d_bound(Shape{m, n});
    const Tensor<double> ld = converted<double>(logits);
    ops::cross_entropy(reference.ctx, matrix(ld), targets, scale, vector_of(losses), d.view<2>());
    for (std::int64_t i = 0; i < m; ++i) {
      const double* row = ld.data() + i * n;
      const double top = *std::max_element(row, row + n);
      double sum = 0, weighted = 0;
      for (std::int64_t j = 0; j < n; ++j) {
        sum += std::exp(row[j] - top);
        weighted += std::exp(row[j] - top) * (top - row[j]);
      }
      const double e_sum = chain(std::min<std::int64_t>(n, 1024)) + 8 * u32 + u32 * weighted / sum;
      if (targets[static_cast<std::size_t>(i)] == ignored_target) continue;
      losses_bound.data()[i] = e_sum + 2 * u32 * std::abs(losses.data()[i]);
      for (std::int64_t j = 0; j < n; ++j) {
        const double p = std::exp(row[j] - top) / sum;
        // Below 2^-126 the kernels' exp is 0.
        d_bound.data()[i * n + j] = scale * p * (e_sum + (10 + top - row[j]) * u32) + 0x1.0p-120 + (j == targets[static_cast<std::size_t>(i)] ? 2 * u32 * scale : 0);
      }
    }
    for (const Variant& variant : variants(DType::f32)) {
      const std::string name = concat(label(variant, DType::f32), " n=", n);
      auto got = on_threads(variant, [&](Cpu backend) {
        Runner<Cpu> cpu(backend);
        std::vector<Strided<float>> out;
        out.push_back(Strided<float>(m, 1, 0, 0.0F));
        out.push_back(Strided<float>(m, n, 3, 7777.0F));
        out.push_back(strided(logits, 2));
        ops::cross_entropy(cpu.ctx, matrix(logits), targets, scale, Vector<float>(out[0].view().data(), {m}), out[1].view());
        ops::cross_entropy(cpu.ctx, view(out[2]), targets, scale, Vector<float>(out[0].view().data(), {m}), out[2].view());
        return out;
      });
      check(got[0], losses, losses_bound, name + " losses");
      check(got[1], d, d_bound, name + " dlogits");
      CHECK_MESSAGE(same_bits<float>(got[1].view(), got[2].view()), name, ": dlogits in place of the logits");
    }
  }
}

TEST_CASE("a NaN among the logits is a NaN of the loss, wherever it stands") {
  for (const Variant& variant : variants(DType::f32))
    for (const std::int64_t n : {1, 5, 33, 1000, 2051}) {
      Runner<Cpu> cpu(Cpu(variant.options(1)));
      for (const std::int64_t at : {std::int64_t{0}, n / 2, n - 1}) {
        Tensor<float> logits(Shape{1, n}), losses(Shape{1});
        for (std::int64_t i = 0; i < n; ++i) logits.data()[i] = static_cast<float>(i % 7);
        logits.data()[at] = std::numeric_limits<float>::quiet_NaN();
        const std::vector<std::int32_t> targets{static_cast<std::int32_t>(n == 1 ? 0 : (at + 1) % n)};
        ops::cross_entropy(cpu.ctx, matrix(logits), targets, 1.0, Vector<float>(losses.data(), {1}), Matrix<float>{});
        CHECK_MESSAGE(losses.data()[0] != losses.data()[0], label(variant, DType::f32), " ", at, " of ", n);
      }
    }
}

}  // namespace
