// The kernels of backward.cuh against Reference<double>, on the same rounded inputs. Bounds, with u = 2^-24: a chain of K additions of
// rounded products is off by at most (2K + 2)·u·Σ|terms|; errors of factors are carried through to first order; a result is rounded to E
// once. Every kernel runs twice, over threads and blocks in the opposite order on the emulator, and gives the same bits.
#include "device_support.hpp"

#include <m2lm/backends/cuda/kernels/backward.cuh>
#include <m2lm/backends/reference/reference.hpp>
#include <m2lm/ops/loss.hpp>

#include <algorithm>
#include <memory>

namespace {

using namespace m2lm_test;

constexpr double u32 = roundoff<float>;
double chain(std::int64_t terms) { return (2.0 * static_cast<double>(terms) + 2) * u32; }

template <class E>
double rounding(double expected) {
  return std::is_same_v<E, float> ? 0 : 1.01 * roundoff<E> * std::abs(expected) + underflow<E>;
}

/// A packed matrix over the elements of another owner.
PackedMatrix packed_over(const void* elements, DType format, std::int64_t rows, std::int64_t cols) {
  PackedMatrix packed;
  packed.format = format;
  packed.rows = rows;
  packed.cols = cols;
  packed.data = std::shared_ptr<const std::byte>(std::shared_ptr<const void>(), static_cast<const std::byte*>(elements));
  return packed;
}

struct Oracle {
  Reference<double> backend;
  Arena arena;
  Context<Reference<double>> ctx{backend, arena};
};

/// A matrix of numbers that E can hold, on the host as double.
struct Numbers {
  std::int64_t rows = 0, cols = 0;
  std::vector<double> values;

  Numbers(std::int64_t rows_, std::int64_t cols_) : rows(rows_), cols(cols_), values(static_cast<std::size_t>(rows_ * cols_)) {}
  double& at(std::int64_t i, std::int64_t j) { return values[static_cast<std::size_t>(i * cols + j)]; }
  double at(std::int64_t i, std::int64_t j) const { return values[static_cast<std::size_t>(i * cols + j)]; }
  Matrix<double> view() { return {values.data(), {rows, cols}}; }
  Matrix<const double> view() const { return {values.data(), {rows, cols}}; }
  Vector<double> vector() { return {values.data(), {rows * cols}}; }
  Vector<const double> vector() const { return {values.data(), {rows * cols}}; }
};

template <class E>
Numbers random_numbers(Random& random, std::int64_t rows, std::int64_t cols, float scale = 1) {
  Numbers out(rows, cols);
  for (double& x : out.values) x = static_cast<double>(to_float(element<E>(scale * random.value())));
  return out;
}
Numbers magnitudes(Numbers x) {
  for (double& value : x.values) value = std::abs(value);
  return x;
}

template <class E>
std::vector<E> elements(const Numbers& x) {
  std::vector<E> out;
  for (const double value : x.values) out.push_back(element<E>(static_cast<float>(value)));
  return out;
}
template <class E>
DeviceMatrix<E> upload(cuda::Device& device, const Numbers& x, std::int64_t extra = 0, std::int64_t offset = 0) {
  return DeviceMatrix<E>(device, x.rows, x.cols, elements<E>(x), extra, offset);
}

template <class E>
void check(const std::vector<E>& got, const Numbers& expected, const Numbers& bound, const std::string& what) {
  REQUIRE(got.size() == expected.values.size());
  Worst worst;
  for (std::size_t i = 0; i < got.size(); ++i)
    worst.add(to_float(got[i]), expected.values[i], bound.values[i] + rounding<E>(expected.values[i]), static_cast<std::int64_t>(i));
  CHECK_MESSAGE(worst.passed(), dtype_name(dtype_of<E>), " ", what, " ", worst.where());
}

template <class E>
using Results = std::vector<std::vector<E>>;

/// Runs `run` twice; it gives its results as vectors, whose bits must be equal.
template <class F>
auto twice(F&& run) {
  auto first = run();
  const auto second = run();
  for (std::size_t i = 0; i < first.size(); ++i) CHECK_MESSAGE(same_bits(first[i], second[i]), "result ", i, " differs from run to run");
  return first;
}

constexpr std::array<Activation, 6> activations{Activation::none, Activation::relu,      Activation::silu,
                                                Activation::gelu, Activation::gelu_tanh, Activation::quick_gelu};

}  // namespace

TEST_CASE_TEMPLATE("the gradient of a linear layer's input, written or added", E, float, Half, Bf16) {
  cuda::Device device(0);
  Oracle oracle;
  Random random(1);
  for (int trial = 0; trial < 12; ++trial) {
    const std::int64_t m = random.integer(1, 20), n = random.integer(1, 40), k = random.integer(1, 40), extra = random.integer(0, 3);
    const bool accumulate = random.coin();
    const Numbers dy = random_numbers<E>(random, m, n), w = random_numbers<E>(random, n, k), before = random_numbers<E>(random, m, k);
    const auto expect = [&](const Numbers& a, const Numbers& b, Numbers c) {
      const PackedMatrix packed = packed_over(b.values.data(), DType::native, n, k);
      ops::linear_input_gradient(oracle.ctx, a.view(), packed, c.view(), accumulate);
      return c;
    };
    const Numbers expected = expect(dy, w, before);
    Numbers bound = expect(magnitudes(dy), magnitudes(w), magnitudes(before));
    for (double& b : bound.values) b *= chain(n + 1);
    const auto got = twice([&] {
      const auto there = upload<E>(device, dy, extra), weight = upload<E>(device, w), dx = upload<E>(device, before, extra + 1);
      const PackedMatrix packed = packed_over(weight.view().data(), dtype_of<E>, n, k);
      cuda::linear_input_gradient<E>(device, there.const_view(), packed, dx.view(), accumulate, nullptr);
      return Results<E>{dx.read()};
    });
    check<E>(got[0], expected, bound, concat("m=", m, " n=", n, " k=", k, " accumulate=", accumulate));
  }
}

namespace {

/// w rounded to blocks of a format, and those blocks as a device has them.
template <class Block>
std::vector<std::byte> quantised(Numbers& w) {
  const cuda::QuantisedLayout layout{Block::dtype, false, w.rows, w.cols};
  std::vector<std::byte> out(layout.bytes());
  for (std::int64_t row = 0; row < w.rows; ++row)
    for (std::int64_t first = 0; first < w.cols; first += block_values) {
      float values[block_values] = {};
      const std::int64_t count = std::min<std::int64_t>(block_values, w.cols - first);
      for (std::int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(w.at(row, first + i));
      const Block block = quantise<Block>(values);
      for (std::int64_t i = 0; i < count; ++i) w.at(row, first + i) = static_cast<double>(dequantise(block, i));
      std::byte* tiles = out.data() + static_cast<std::size_t>(row / 16) * layout.row_tile_bytes();
      cuda::detail::place_block(block, first / block_values, row % 16, tiles, tiles + layout.scales_at());
    }
  return out;
}

template <class E, class Block>
void check_quantised_input_gradient(Random& random) {
  cuda::Device device(0);
  Oracle oracle;
  for (const auto& [m, n, k] : std::vector<std::array<std::int64_t, 3>>{{1, 1, 1}, {3, 16, 64}, {5, 37, 70}, {2, 20, 200}}) {
    const Numbers dy = random_numbers<E>(random, m, n);
    Numbers w = random_numbers<float>(random, n, k);
    const DeviceArray<std::byte> there(device, quantised<Block>(w));
    const auto expect = [&, rows = m, inputs = k, outputs = n](const Numbers& a, const Numbers& b) {
      Numbers c(rows, inputs);
      ops::linear_input_gradient(oracle.ctx, a.view(), packed_over(b.values.data(), DType::native, outputs, inputs), c.view());
      return c;
    };
    const Numbers expected = expect(dy, w);
    Numbers bound = expect(magnitudes(dy), magnitudes(w));
    for (double& b : bound.values) b *= chain(n) + (std::is_same_v<E, float> ? 0 : roundoff<E>);  // the value of a block is exact in f32
    const auto dy_there = upload<E>(device, dy);
    const DeviceMatrix<E> dx(device, m, k);
    const PackedMatrix packed = packed_over(there.data(), Block::dtype, n, k);
    const DeviceArray<std::byte> scratch(device, cuda::linear_input_gradient_scratch<E>(packed));
    cuda::linear_input_gradient<E>(device, dy_there.const_view(), packed, dx.view(), false, scratch.data());
    check<E>(dx.read(), expected, bound, concat(dtype_name(Block::dtype), " m=", m, " n=", n, " k=", k));
  }
}

}  // namespace

TEST_CASE_TEMPLATE("gradients go through quantised weights", E, float, Half, Bf16) {
  Random random(9);
  check_quantised_input_gradient<E, Q8Block>(random);
  check_quantised_input_gradient<E, Q4Block>(random);
}

TEST_CASE_TEMPLATE("the gradients of a linear layer's weight and bias are added", E, float, Half, Bf16) {
  cuda::Device device(0);
  Oracle oracle;
  Random random(2);
  for (int trial = 0; trial < 12; ++trial) {
    const std::int64_t m = trial == 0 ? 300 : random.integer(1, 40), n = random.integer(1, 70), k = random.integer(1, 30),
                       extra = random.integer(0, 3);
    const std::int64_t parts = random.integer(0, 4);  // 0: the weight alone, 1: the bias alone, else both
    const Numbers x = random_numbers<E>(random, m, k), dy = random_numbers<E>(random, m, n), dw0 = random_numbers<E>(random, n, k),
                  db0 = random_numbers<E>(random, 1, n);
    const auto expect = [&](const Numbers& a, const Numbers& b, Numbers dw, Numbers db) {
      ops::linear_weight_gradient(oracle.ctx, a.view(), b.view(), parts == 1 ? Matrix<double>{} : dw.view(),
                                  parts == 0 ? Vector<double>{} : db.vector());
      return std::pair{std::move(dw), std::move(db)};
    };
    const auto expected = expect(x, dy, dw0, db0);
    auto bound = expect(magnitudes(x), magnitudes(dy), magnitudes(dw0), magnitudes(db0));
    for (double& b : bound.first.values) b *= chain(m + 1);
    for (double& b : bound.second.values) b *= chain(m + 1);
    const auto got = twice([&] {
      const auto there = upload<E>(device, x, extra), gradient = upload<E>(device, dy, extra + 1), dw = upload<E>(device, dw0),
                 db = upload<E>(device, db0);
      cuda::linear_weight_gradient<E>(device, there.const_view(), gradient.const_view(), parts == 1 ? Matrix<E>{} : dw.view(),
                                      parts == 0 ? nullptr : db.view().data());
      return Results<E>{dw.read(), db.read()};
    });
    const std::string what = concat("m=", m, " n=", n, " k=", k, " parts=", parts);
    check<E>(got[0], expected.first, bound.first, what + " weight");
    check<E>(got[1], expected.second, bound.second, what + " bias");
  }
}

TEST_CASE_TEMPLATE("slopes of activations, alone and gated, in place", E, float, Half, Bf16) {
  // f' is a sum of a sigmoid or an error function (6 roundings of at most 1) and of a·s(1 - s)·c, where |a|·s·(1 - s)·c < 1: 24 roundings with
  // the argument's, which grow with |a|. f is off by 18·u·|a|.
  cuda::Device device(0);
  Oracle oracle;
  Random random(3);
  for (const Activation activation : activations)
    for (const bool gated : {false, true})
      for (const std::int64_t n : {1, 5, 16, 40}) {
        const std::int64_t m = 3, wide = gated ? 2 * n : n, extra = n % 8 == 0 ? 8 : 3;
        const Numbers dy = random_numbers<E>(random, m, n), z = random_numbers<E>(random, m, wide, 4);
        Numbers expected(m, wide), bound(m, wide);
        ops::activation_backward(oracle.ctx, dy.view(), z.view(), activation, expected.view());
        for (std::int64_t i = 0; i < m; ++i)
          for (std::int64_t j = 0; j < n; ++j) {
            const double a = std::abs(z.at(i, j)), b = gated ? std::abs(z.at(i, n + j)) : 1, g = std::abs(dy.at(i, j));
            bound.at(i, j) = 24 * u32 * (1 + a) * g * b;
            if (gated) bound.at(i, n + j) = 18 * u32 * a * g;
          }
        const std::string what = concat("activation ", static_cast<int>(activation), " gated=", gated, " n=", n);
        const auto dy_there = upload<E>(device, dy, extra), z_there = upload<E>(device, z, extra);
        const auto got = twice([&] {
          const DeviceMatrix<E> dz(device, m, wide, extra);
          cuda::activation_backward<E>(device, dy_there.const_view(), z_there.const_view(), activation, dz.view());
          return Results<E>{dz.read()};
        });
        check<E>(got[0], expected, bound, what);
        if (!gated) {
          const auto over = upload<E>(device, dy, extra);
          cuda::activation_backward<E>(device, over.const_view(), z_there.const_view(), activation, over.view());
          CHECK_MESSAGE(same_bits(over.read(), got[0]), what, ": dz in place of dy");
        }
        cuda::activation_backward<E>(device, dy_there.const_view(), z_there.const_view(), activation, z_there.view());
        CHECK_MESSAGE(same_bits(z_there.read(), got[0]), what, ": dz in place of z");
      }
}

TEST_CASE_TEMPLATE("the gradients of the norms", E, float, Half, Bf16) {
  // To first order, with c = (x - mean)·r: r is off by a relative (n + 4)·u, the mean by chain(n)·mean|x|, so c by
  // e = chain(n)·(|c| + r·mean|x|) + 4u|c|. mean(g) and mean(g·c) are sums of n terms, the second with c's error in every term.
  cuda::Device device(0);
  Oracle oracle;
  Random random(4);
  for (int trial = 0; trial < 16; ++trial) {
    const std::int64_t m = trial == 0 ? 70 : random.integer(1, 9), n = trial == 1  ? 2100
                                                                       : trial < 6 ? 8 * random.integer(1, 20)
                                                                                   : random.integer(1, 150);
    const std::int64_t extra = trial < 6 ? 8 : random.integer(0, 3), parts = random.integer(0, 4);  // 0: dx alone, 1: the parameters alone
    const bool centred = random.coin(), accumulate = random.coin();
    const double eps = 1e-5;
    const Numbers x = random_numbers<E>(random, m, n), dy = random_numbers<E>(random, m, n), w = random_numbers<E>(random, 1, n),
                  dx0 = random_numbers<E>(random, m, n), dw0 = random_numbers<E>(random, 1, n), db0 = random_numbers<E>(random, 1, n);
    Numbers dx = dx0, dw = dw0, db = db0;
    const auto dx_view = parts == 1 ? Matrix<double>{} : dx.view();
    const auto dw_view = parts == 0 ? Vector<double>{} : dw.vector(), db_view = parts == 0 ? Vector<double>{} : db.vector();
    if (centred)
      ops::layer_norm_backward(oracle.ctx, dy.view(), x.view(), w.vector(), eps, dx_view, accumulate, dw_view, db_view);
    else
      ops::rms_norm_backward(oracle.ctx, dy.view(), x.view(), w.vector(), eps, dx_view, accumulate, dw_view);
    Numbers dx_bound(m, n), dw_bound(1, n), db_bound(1, n);
    const auto size = static_cast<double>(n);
    for (std::int64_t j = 0; j < n; ++j) {
      dw_bound.at(0, j) = chain(m + 1) * std::abs(dw0.at(0, j));
      db_bound.at(0, j) = chain(m + 1) * std::abs(db0.at(0, j));
    }
    for (std::int64_t i = 0; i < m; ++i) {
      double mean = 0, mean_abs = 0, squares = 0, mean_g = 0, mean_gc = 0, mean_ge = 0;
      for (std::int64_t j = 0; j < n; ++j) {
        mean += centred ? x.at(i, j) / size : 0;
        mean_abs += centred ? std::abs(x.at(i, j)) / size : 0;
      }
      for (std::int64_t j = 0; j < n; ++j) squares += (x.at(i, j) - mean) * (x.at(i, j) - mean);
      const double r = 1 / std::sqrt(squares / size + eps);
      const auto g_of = [&](std::int64_t j) { return std::abs(dy.at(i, j) * w.at(0, j)); };
      const auto c_of = [&](std::int64_t j) { return std::abs(x.at(i, j) - mean) * r; };
      const auto e_of = [&](std::int64_t j) { return chain(n) * (c_of(j) + r * mean_abs) + 4 * u32 * c_of(j); };
      for (std::int64_t j = 0; j < n; ++j) {
        mean_g += centred ? g_of(j) / size : 0;
        mean_gc += g_of(j) * c_of(j) / size;
        mean_ge += g_of(j) * e_of(j) / size;
      }
      for (std::int64_t j = 0; j < n; ++j) {
        const double c = c_of(j), e = e_of(j), terms = g_of(j) + mean_g + c * mean_gc;
        dx_bound.at(i, j) = r * (chain(n) * (terms + mean_g + c * mean_gc) + 6 * u32 * terms + e * mean_gc + c * mean_ge) +
                            (accumulate ? 2 * u32 * std::abs(dx0.at(i, j)) : 0) + u32 * r * terms;
        dw_bound.at(0, j) += std::abs(dy.at(i, j)) * (chain(m + 1) * c + e);
        db_bound.at(0, j) += std::abs(dy.at(i, j)) * chain(m + 1);
      }
    }
    const auto x_there = upload<E>(device, x, extra), dy_there = upload<E>(device, dy, extra), w_there = upload<E>(device, w);
    const auto got = twice([&] {
      const auto dx_there = upload<E>(device, dx0, extra), dw_there = upload<E>(device, dw0), db_there = upload<E>(device, db0);
      const DeviceArray<std::byte> scratch(device, cuda::norm_backward_scratch(m));
      const auto dx_out = parts == 1 ? Matrix<E>{} : dx_there.view();
      E* dw_out = parts == 0 ? nullptr : dw_there.view().data();
      E* db_out = parts == 0 ? nullptr : db_there.view().data();
      const E* weight = w_there.view().data();
      if (centred)
        cuda::layer_norm_backward<E>(device, dy_there.const_view(), x_there.const_view(), weight, 1e-5F, dx_out, accumulate, dw_out, db_out,
                                     scratch.data());
      else
        cuda::rms_norm_backward<E>(device, dy_there.const_view(), x_there.const_view(), weight, 1e-5F, dx_out, accumulate, dw_out, scratch.data());
      return Results<E>{dx_there.read(), dw_there.read(), db_there.read()};
    });
    const std::string what = concat("m=", m, " n=", n, " centred=", centred, " accumulate=", accumulate, " parts=", parts);
    check<E>(got[0], dx, dx_bound, what + " dx");
    check<E>(got[1], dw, dw_bound, what + " dweight");
    check<E>(got[2], db, db_bound, what + " dbias");
  }
}

TEST_CASE_TEMPLATE("the gradient of the rotation", E, float, Half, Bf16) {
  cuda::Device device(0);
  Oracle oracle;
  Random random(5);
  for (const std::int64_t head_dim : {2, 6, 32, 66}) {
    const std::int64_t m = 5, n = 3 * head_dim, extra = head_dim == 32 ? 8 : 1;
    const Numbers x = random_numbers<E>(random, m, n), cos = random_numbers<float>(random, m, head_dim / 2),
                  sin = random_numbers<float>(random, m, head_dim / 2);
    Numbers expected = x, bound(m, n);
    ops::rope_backward(oracle.ctx, expected.view(), head_dim, cos.view(), sin.view());
    for (double& b : bound.values) b = 4 * u32 * 2 * 3.5 * 3.5;  // two products of numbers below 3.5
    const auto cos_there = upload<float>(device, cos, extra + 3), sin_there = upload<float>(device, sin, extra + 3);
    const auto got = twice([&] {
      const auto dx = upload<E>(device, x, extra);
      cuda::rope_backward<E>(device, dx.view(), head_dim, cos_there.const_view(), sin_there.const_view());
      return Results<E>{dx.read()};
    });
    check<E>(got[0], expected, bound, concat("head_dim=", head_dim));
  }
}

TEST_CASE_TEMPLATE("rows are added to a table in their order; ids outside it add nothing", E, float, Half, Bf16) {
  cuda::Device device(0);
  Oracle oracle;
  Random random(6);
  for (const std::int64_t columns : {1, 37, 300}) {
    std::vector<std::int32_t> ids;
    for (int i = 0; i < 300; ++i) ids.push_back(static_cast<std::int32_t>(random.integer(0, 5)));
    const auto count = static_cast<std::int64_t>(ids.size());
    const Numbers rows = random_numbers<E>(random, count, columns), before = random_numbers<E>(random, 7, columns);
    Numbers expected = before, bound = magnitudes(before);
    ops::scatter_add_rows(oracle.ctx, rows.view(), ids, expected.view());
    ops::scatter_add_rows(oracle.ctx, magnitudes(rows).view(), ids, bound.view());
    for (double& b : bound.values) b *= chain(count);
    // Two more rows, for nobody.
    std::vector<std::int32_t> all = ids;
    all.push_back(7);
    all.push_back(-1);
    Numbers more = random_numbers<E>(random, count + 2, columns);
    std::copy(rows.values.begin(), rows.values.end(), more.values.begin());
    const DeviceArray<std::int32_t> ids_there(device, all);
    const auto rows_there = upload<E>(device, more, 2);
    const auto got = twice([&] {
      const auto table = upload<E>(device, before, 1);
      cuda::scatter_add_rows<E>(device, rows_there.const_view(), ids_there.data(), table.view());
      return Results<E>{table.read()};
    });
    check<E>(got[0], expected, bound, concat("columns=", columns));
  }
}

namespace {

struct AttentionCase {
  std::int64_t head_dim, kv_heads, group, queries, keys;
  AttentionMask mask{};
  std::string string() const {
    return concat("head_dim=", head_dim, " heads=", kv_heads * group, "/", kv_heads, " queries=", queries, " keys=", keys, " causal=", mask.causal,
                  " window=", mask.window);
  }
};

/// Bounds on the gradients, from y as the kernel is given it, and y itself.
struct AttentionBounds {
  Numbers y, dq, dk, dv;
};

/// To first order: a score is off by e_s = chain(d)·scale·Σ|q||k|; the log of their sum by the largest e_s, (2·keys + 8)·u and its rounding; a
/// probability so by a relative e_p; dp by chain(d)·Σ|dy||v|, dy·y by chain(d)·Σ|dy||y|; and so on through ds = p·(dp − dy·y)·scale.
/// `round` is what y is rounded by.
template <class Round>
AttentionBounds attention_bounds(const AttentionCase& c, const Numbers& q, const Numbers& k, const Numbers& v, const Numbers& dy, double scale,
                                 const Round& round) {
  AttentionBounds out{Numbers(q.rows, q.cols), Numbers(q.rows, q.cols), Numbers(k.rows, k.cols), Numbers(k.rows, k.cols)};
  const std::int64_t d = c.head_dim;
  std::vector<double> p(static_cast<std::size_t>(c.keys)), dp = p, e_dp = p;
  for (std::int64_t h = 0; h < c.kv_heads * c.group; ++h)
    for (std::int64_t t = 0; t < c.queries; ++t) {
      const std::int64_t begin = c.mask.window > 0 ? std::max<std::int64_t>(0, t - c.mask.window + 1) : 0,
                         end = c.mask.causal || c.mask.window > 0 ? std::min(c.keys, t + 1) : c.keys;
      const std::int64_t at = h * d, kv_at = h / c.group * d;
      double largest = -1e300, sum = 0, e_s = 0, mean = 0, e_mean = 0;
      for (std::int64_t j = begin; j < end; ++j) {
        const auto i = static_cast<std::size_t>(j);
        double s = 0, size = 0;
        dp[i] = e_dp[i] = 0;
        for (std::int64_t x = 0; x < d; ++x) {
          const double qk = q.at(t, at + x) * k.at(j, kv_at + x), dyv = dy.at(t, at + x) * v.at(j, kv_at + x);
          s += qk;
          size += std::abs(qk);
          dp[i] += dyv;
          e_dp[i] += chain(d) * std::abs(dyv);
        }
        p[i] = s * scale;
        e_s = std::max(e_s, (chain(d) + 2 * u32) * scale * size);
        largest = std::max(largest, p[i]);
      }
      for (std::int64_t j = begin; j < end; ++j) sum += std::exp(p[static_cast<std::size_t>(j)] - largest);
      double lowest = largest;
      for (std::int64_t j = begin; j < end; ++j) {
        double& of_key = p[static_cast<std::size_t>(j)];
        lowest = std::min(lowest, of_key);
        of_key = std::exp(of_key - largest) / sum;
        for (std::int64_t x = 0; x < d; ++x) out.y.at(t, at + x) += of_key * v.at(j, kv_at + x);
      }
      for (std::int64_t x = 0; x < d; ++x) {
        double& y = out.y.at(t, at + x);
        y = round(y);
        mean += dy.at(t, at + x) * y;
        e_mean += chain(d) * std::abs(dy.at(t, at + x) * y);
      }
      const double log_sum = std::abs(largest) + std::log(sum);
      const double e_p = 2 * e_s + (2 * static_cast<double>(c.keys) + 30 + 4 * (log_sum + std::abs(lowest))) * u32;
      const double terms = static_cast<double>(std::max(c.keys, c.queries * c.group));
      for (std::int64_t j = begin; j < end; ++j) {
        const auto i = static_cast<std::size_t>(j);
        const double ds = std::abs(p[i] * (dp[i] - mean) * scale);
        const double e_ds = scale * p[i] * (e_dp[i] + e_mean) + ds * (e_p + 4 * u32) + (2 * terms + 4) * u32 * ds;
        for (std::int64_t x = 0; x < d; ++x) {
          out.dq.at(t, at + x) += e_ds * std::abs(k.at(j, kv_at + x));
          out.dk.at(j, kv_at + x) += e_ds * std::abs(q.at(t, at + x));
          out.dv.at(j, kv_at + x) += p[i] * (e_p + (2 * terms + 4) * u32) * std::abs(dy.at(t, at + x));
        }
      }
    }
  return out;
}

}  // namespace

TEST_CASE_TEMPLATE("the gradient of attention: groups, masks, windows, odd sizes, both sizes of tiles", E, float, Half, Bf16) {
  cuda::Device device(0);
  Oracle oracle;
  Random random(7);
  std::vector<AttentionCase> cases{{64, 1, 2, 70, 70, {.causal = true}},
                                   {5, 2, 1, 33, 47, {}},
                                   {1, 1, 1, 1, 1, {}},
                                   {16, 1, 3, 100, 100, {.causal = true, .window = 20}},
                                   {16, 1, 1, 65, 80, {.window = 1}},
                                   {320, 1, 1, 20, 40, {.causal = true}},
                                   {321, 1, 2, 9, 33, {}},
                                   {8, 1, 1, 3, 90, {}}};
  for (int i = 0; i < 4; ++i) {
    const std::int64_t keys = random.integer(1, 70);
    cases.push_back({random.integer(1, 20),
                     random.integer(1, 2),
                     random.integer(1, 3),
                     random.integer(1, keys),
                     keys,
                     {.causal = random.coin(), .window = random.coin() ? random.integer(1, 30) : 0}});
  }
  for (const AttentionCase& c : cases) {
    const double scale = 1 / std::sqrt(static_cast<double>(c.head_dim));
    const std::int64_t width = c.kv_heads * c.group * c.head_dim, kv_width = c.kv_heads * c.head_dim, extra = random.integer(0, 3);
    const Numbers q = random_numbers<E>(random, c.queries, width), k = random_numbers<E>(random, c.keys, kv_width),
                  v = random_numbers<E>(random, c.keys, kv_width), dy = random_numbers<E>(random, c.queries, width);
    const auto f32_scale = static_cast<float>(scale);
    const AttentionBounds bound =
        attention_bounds(c, q, k, v, dy, f32_scale, [](double y) { return static_cast<double>(to_float(element<E>(static_cast<float>(y)))); });
    Numbers dq(q.rows, q.cols), dk(k.rows, k.cols), dv(k.rows, k.cols);
    ops::attention_backward(oracle.ctx, q.view(), k.view(), v.view(), bound.y.view(), dy.view(), c.head_dim, c.mask, static_cast<double>(f32_scale),
                            dq.view(), dk.view(), dv.view());
    const auto q_there = upload<E>(device, q, extra), k_there = upload<E>(device, k, extra + 1), v_there = upload<E>(device, v, extra),
               y_there = upload<E>(device, bound.y, 1), dy_there = upload<E>(device, dy, extra);
    const auto got = twice([&] {
      const DeviceMatrix<E> dq_there(device, c.queries, width, extra), dk_there(device, c.keys, kv_width, extra),
          dv_there(device, c.keys, kv_width, 2);
      const DeviceArray<std::byte> scratch(device, cuda::attention_backward_scratch(c.queries, c.kv_heads * c.group));
      cuda::attention_backward<E>(device, q_there.const_view(), k_there.const_view(), v_there.const_view(), y_there.const_view(),
                                  dy_there.const_view(), c.head_dim, c.mask, f32_scale, dq_there.view(), dk_there.view(), dv_there.view(),
                                  scratch.data());
      return Results<E>{dq_there.read(), dk_there.read(), dv_there.read()};
    });
    check<E>(got[0], dq, bound.dq, c.string() + " dq");
    check<E>(got[1], dk, bound.dk, c.string() + " dk");
    check<E>(got[2], dv, bound.dv, c.string() + " dv");
  }
}

TEST_CASE("tiles of attention's gradient are as large as shared memory allows") {
  constexpr std::size_t of_sm80 = 163 * 1024, of_sm86 = 99 * 1024, of_sm90 = 227 * 1024;
  CHECK(cuda::attention_backward_tiles(of_sm90, 128).rows_per_warp == 4);
  CHECK(cuda::attention_backward_tiles(of_sm80, 128).rows_per_warp == 4);
  CHECK(cuda::attention_backward_tiles(of_sm86, 128).rows_per_warp == 1);
  CHECK(cuda::attention_backward_tiles(of_sm80, 256).rows_per_warp == 1);
  CHECK(cuda::attention_backward_tiles(of_sm90, 1024).rows_per_warp == 0);
  cuda::Device device(0);
  const DeviceMatrix<float> x(device, 1, 4096);
  CHECK_THROWS_AS(cuda::attention_backward<float>(device, x.const_view(), x.const_view(), x.const_view(), x.const_view(), x.const_view(), 4096, {}, 1,
                                                  x.view(), x.view(), x.view(), nullptr),
                  OptionError);
}

TEST_CASE_TEMPLATE("cross-entropy: losses and gradients, ignored rows, in place", E, float, Half, Bf16) {
  // Σ exp is off by a relative chain(n) + 8u and each exp by its argument's rounding u·|l − max|.
  cuda::Device device(0);
  Oracle oracle;
  Random random(8);
  for (const std::int64_t n : {1, 3, 16, 100, 1025, 2048}) {
    const std::int64_t m = 4;
    const float scale = 0.375F;
    Numbers logits = random_numbers<E>(random, m, n, 5);
    std::vector<std::int32_t> targets;
    for (std::int64_t i = 0; i < m; ++i) targets.push_back(i == 2 ? ignored_target : static_cast<std::int32_t>(random.integer(0, n - 1)));
    logits.at(0, 0) = 300;  // exp overflows unless the largest is taken off
    Numbers losses(m, 1), expected(m, n), losses_bound(m, 1), bound(m, n);
    ops::cross_entropy(oracle.ctx, logits.view(), targets, scale, losses.vector(), expected.view());
    for (std::int64_t i = 0; i < m; ++i) {
      if (targets[static_cast<std::size_t>(i)] == ignored_target) continue;
      double top = logits.at(i, 0), sum = 0, weighted = 0;
      for (std::int64_t j = 0; j < n; ++j) top = std::max(top, logits.at(i, j));
      for (std::int64_t j = 0; j < n; ++j) {
        sum += std::exp(logits.at(i, j) - top);
        weighted += std::exp(logits.at(i, j) - top) * (top - logits.at(i, j));
      }
      const double e_sum = chain(n) + 8 * u32 + u32 * weighted / sum;
      losses_bound.at(i, 0) = e_sum + 3 * u32 * (std::abs(losses.at(i, 0)) + std::log(sum));
      for (std::int64_t j = 0; j < n; ++j) {
        const double p = std::exp(logits.at(i, j) - top) / sum;
        // Below 2^-126 an f32 is 0 or has few digits.
        bound.at(i, j) = static_cast<double>(scale) * p * (e_sum + (10 + top - logits.at(i, j)) * u32) + 0x1.0p-120 +
                         (j == targets[static_cast<std::size_t>(i)] ? 2 * u32 * static_cast<double>(scale) : 0);
      }
    }
    const std::int64_t extra = n % 8 == 0 ? 8 : 1;
    const DeviceArray<std::int32_t> targets_there(device, targets);
    const DeviceArray<float> losses_there(device, static_cast<std::size_t>(m));
    const auto logits_there = upload<E>(device, logits, extra);
    const auto got = twice([&] {
      const DeviceMatrix<E> d(device, m, n, extra);
      cuda::cross_entropy<E>(device, logits_there.const_view(), targets_there.data(), scale, losses_there.data(), d.view());
      return Results<E>{d.read()};
    });
    check<E>(got[0], expected, bound, concat("n=", n));
    check<float>(losses_there.read(), losses, losses_bound, concat("n=", n, " losses"));
    cuda::cross_entropy<E>(device, logits_there.const_view(), targets_there.data(), scale, losses_there.data(), {});
    check<float>(losses_there.read(), losses, losses_bound, concat("n=", n, " losses alone"));
    cuda::cross_entropy<E>(device, logits_there.const_view(), targets_there.data(), scale, losses_there.data(), logits_there.view());
    CHECK_MESSAGE(same_bits(logits_there.read(), got[0]), "n=", n, ": dlogits in place of the logits");
  }
}

TEST_CASE("a NaN among the logits is a NaN of the loss, wherever it stands") {
  cuda::Device device(0);
  for (const std::size_t at : {0, 77, 299}) {
    std::vector<float> logits(300, 1.0F);
    logits[at] = std::numeric_limits<float>::quiet_NaN();
    const DeviceMatrix<float> there(device, 1, 300, logits);
    const DeviceArray<std::int32_t> target(device, std::vector<std::int32_t>{5});
    const DeviceArray<float> loss(device, 1);
    cuda::cross_entropy<float>(device, there.const_view(), target.data(), 1, loss.data(), {});
    CHECK(std::isnan(loss.read()[0]));
  }
}
