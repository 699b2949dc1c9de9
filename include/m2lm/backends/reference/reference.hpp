// Reference<T>: every op as the plain loop of its definition. The oracle of all tests; T is float, double or a dual number.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/ops/attention.hpp>
#include <m2lm/ops/gather.hpp>
#include <m2lm/ops/linear.hpp>
#include <m2lm/ops/loss.hpp>
#include <m2lm/ops/norm.hpp>
#include <m2lm/ops/rope.hpp>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <span>
#include <utility>
#include <vector>

namespace m2lm::inline M2LM_ABI {

/// The oracle backend. It carries its scalar and ignores storage dtypes: weights, activations and caches are T.
template <class T>
struct Reference {
  using Scalar = T;
};

namespace detail {

template <class T>
T apply_activation(Activation activation, T x) {
  using std::erf;
  using std::exp;
  using std::tanh;
  switch (activation) {
    case Activation::none: return x;
    case Activation::relu: return x > T(0) ? x : T(0);
    case Activation::silu: return x / (T(1) + exp(-x));
    case Activation::gelu: return T(0.5) * x * (T(1) + erf(x / T(std::numbers::sqrt2)));
    case Activation::gelu_tanh:
      return T(0.5) * x * (T(1) + tanh(T(0.7978845608028654) * (x + T(0.044715) * x * x * x)));
    case Activation::quick_gelu: return x / (T(1) + exp(T(-1.702) * x));
  }
  return x;
}

/// d apply_activation(x) / dx.
template <class T>
T activation_derivative(Activation activation, T x) {
  using std::erf;
  using std::exp;
  using std::tanh;
  const auto sigmoid_form = [](T z) {  // d/dz of z·sigmoid(z)
    const T s = T(1) / (T(1) + exp(-z));
    return s * (T(1) + z * (T(1) - s));
  };
  switch (activation) {
    case Activation::none: return T(1);
    case Activation::relu: return x > T(0) ? T(1) : T(0);
    case Activation::silu: return sigmoid_form(x);
    case Activation::gelu:
      return T(0.5) * (T(1) + erf(x / T(std::numbers::sqrt2))) + x * exp(T(-0.5) * x * x) * T(0.5 * std::numbers::sqrt2 * std::numbers::inv_sqrtpi);
    case Activation::gelu_tanh: {
      const T t = tanh(T(0.7978845608028654) * (x + T(0.044715) * x * x * x));
      return T(0.5) * (T(1) + t) + T(0.5) * x * (T(1) - t * t) * T(0.7978845608028654) * (T(1) + T(3 * 0.044715) * x * x);
    }
    case Activation::quick_gelu: return sigmoid_form(T(1.702) * x);
  }
  return T(1);
}

/// Keys [begin, end) that a query at `position` sees.
struct KeyRange {
  std::int64_t begin, end;
};
inline KeyRange visible_keys(AttentionMask mask, std::int64_t position, std::int64_t keys) {
  return {mask.window > 0 ? std::max<std::int64_t>(0, position - mask.window + 1) : 0,
          mask.causal || mask.window > 0 ? std::min(keys, position + 1) : keys};
}

}  // namespace detail

namespace ops {

template <class T>
struct Impl<Pack, Reference<T>> {
  static PackedMatrix run(Context<Reference<T>>&, std::span<const AnyTensor> sources, DType, bool gated) {
    std::int64_t rows = 0;
    const std::int64_t cols = columns_of(sources[0].shape());
    for (const AnyTensor& s : sources) rows += s.shape()[0];
    auto storage = std::make_shared<Tensor<T>>(Shape{rows, cols});
    T* out = storage->data();
    for (const AnyTensor& s : sources) {
      s.copy_to(out, 0, s.shape().elements());
      out += s.shape().elements();
    }
    PackedMatrix packed{.format = DType::native, .rows = rows, .cols = cols, .gated = gated, .data = {}, .bytes = static_cast<std::size_t>(rows * cols) * sizeof(T)};
    packed.data = std::shared_ptr<const std::byte>(storage, reinterpret_cast<const std::byte*>(storage->data()));
    return packed;
  }
};

template <class T>
struct Impl<Linear, Reference<T>> {
  static void run(Context<Reference<T>>&, Matrix<const T> x, const PackedMatrix& w, const Epilogue<T>& epilogue, Matrix<T> y) {
    const T* weight = reinterpret_cast<const T*>(w.data.get());
    const auto product = [&](std::int64_t row, std::int64_t output) {
      T sum = epilogue.bias ? epilogue.bias[output] : T(0);
      for (std::int64_t k = 0; k < w.cols; ++k) sum += x(row, k) * weight[output * w.cols + k];
      return sum;
    };
    const std::int64_t outputs = y.extent(1);
    for (std::int64_t i = 0; i < y.extent(0); ++i)
      for (std::int64_t j = 0; j < outputs; ++j) {
        T value = detail::apply_activation(epilogue.activation, product(i, j));
        if (w.gated) value *= product(i, outputs + j);
        if (epilogue.residual.data()) value += epilogue.residual(i, j);
        y(i, j) = value;
      }
  }
};

template <class T>
struct Impl<RmsNorm, Reference<T>> {
  static void run(Context<Reference<T>>&, Matrix<const T> x, Vector<const T> weight, double eps, Matrix<T> y) {
    using std::sqrt;
    for (std::int64_t i = 0; i < x.extent(0); ++i) {
      T squares(0);
      for (std::int64_t j = 0; j < x.extent(1); ++j) squares += x(i, j) * x(i, j);
      const T inverse = T(1) / sqrt(squares / T(static_cast<double>(x.extent(1))) + T(eps));
      for (std::int64_t j = 0; j < x.extent(1); ++j) y(i, j) = x(i, j) * inverse * weight(j);
    }
  }
};

template <class T>
struct Impl<LayerNorm, Reference<T>> {
  static void run(Context<Reference<T>>&, Matrix<const T> x, Vector<const T> weight, Vector<const T> bias, double eps, Matrix<T> y) {
    using std::sqrt;
    const T n = T(static_cast<double>(x.extent(1)));
    for (std::int64_t i = 0; i < x.extent(0); ++i) {
      T mean(0), variance(0);
      for (std::int64_t j = 0; j < x.extent(1); ++j) mean += x(i, j);
      mean = mean / n;
      for (std::int64_t j = 0; j < x.extent(1); ++j) variance += (x(i, j) - mean) * (x(i, j) - mean);
      const T inverse = T(1) / sqrt(variance / n + T(eps));
      for (std::int64_t j = 0; j < x.extent(1); ++j) y(i, j) = (x(i, j) - mean) * inverse * weight(j) + bias(j);
    }
  }
};

template <class T>
struct Impl<Rope, Reference<T>> {
  static void run(Context<Reference<T>>&, Matrix<T> x, std::int64_t head_dim, Matrix<const T> cos, Matrix<const T> sin) {
    const std::int64_t half = head_dim / 2;
    for (std::int64_t t = 0; t < x.extent(0); ++t)
      for (std::int64_t h = 0; h < x.extent(1); h += head_dim)
        for (std::int64_t i = 0; i < half; ++i) {
          const T a = x(t, h + i), b = x(t, h + half + i);
          x(t, h + i) = a * cos(t, i) - b * sin(t, i);
          x(t, h + half + i) = b * cos(t, i) + a * sin(t, i);
        }
  }
};

// Layout of Reference's KeyValues: [kv_heads, capacity, head_dim].
template <class T>
struct Impl<PlanKeyValues, Reference<T>> {
  static KeyValuesPlan run(Context<Reference<T>>&, DType, std::int64_t kv_heads, std::int64_t head_dim, std::int64_t capacity) {
    return {capacity, static_cast<std::size_t>(kv_heads * head_dim * capacity) * sizeof(T)};
  }
};

template <class T>
struct Impl<AppendKeyValues, Reference<T>> {
  static void run(Context<Reference<T>>&, Matrix<const T> k, Matrix<const T> v, std::int64_t first, const KeyValues& kv) {
    for (std::int64_t t = 0; t < k.extent(0); ++t)
      for (std::int64_t h = 0; h < kv.kv_heads; ++h)
        for (std::int64_t c = 0; c < kv.head_dim; ++c) {
          const std::int64_t at = (h * kv.capacity + first + t) * kv.head_dim + c;
          reinterpret_cast<T*>(kv.keys)[at] = k(t, h * kv.head_dim + c);
          reinterpret_cast<T*>(kv.values)[at] = v(t, h * kv.head_dim + c);
        }
  }
};

template <class T>
struct Impl<CopyKeyValues, Reference<T>> {
  static void run(Context<Reference<T>>&, const KeyValues& from, std::int64_t count, const KeyValues& to) {
    for (std::int64_t h = 0; h < from.kv_heads; ++h)
      for (const auto& [source, target] : {std::pair(from.keys, to.keys), std::pair(from.values, to.values)})
        std::copy_n(reinterpret_cast<const T*>(source) + h * from.capacity * from.head_dim, count * from.head_dim,
                    reinterpret_cast<T*>(target) + h * to.capacity * to.head_dim);
  }
};

template <class T>
struct Impl<Attention, Reference<T>> {
  static void run(Context<Reference<T>>&, Matrix<const T> q, const KeyValues& kv, std::int64_t keys, std::int64_t first, AttentionMask mask,
                  double scale, Matrix<T> y, Sinks sinks) {
    using std::exp;
    const std::int64_t d = kv.head_dim, heads = q.extent(1) / d, group = heads / kv.kv_heads;
    std::vector<T> p(static_cast<std::size_t>(keys));
    for (std::int64_t t = 0; t < q.extent(0); ++t)
      for (std::int64_t h = 0; h < heads; ++h) {
        const auto [begin, end] = detail::visible_keys(mask, first + t, keys);
        const T* k = reinterpret_cast<const T*>(kv.keys) + h / group * kv.capacity * d;
        const T* v = reinterpret_cast<const T*>(kv.values) + h / group * kv.capacity * d;
        T largest(0), sum(0);
        for (std::int64_t j = begin; j < end; ++j) {
          T s(0);
          for (std::int64_t c = 0; c < d; ++c) s += q(t, h * d + c) * k[j * d + c];
          s *= T(scale);
          p[static_cast<std::size_t>(j)] = s;
          if ((j == begin && !sinks.zero_logit) || s > largest) largest = s;
        }
        if (sinks.zero_logit && !M2LM_FAULT(60)) sum = exp(-largest);
        for (std::int64_t j = begin; j < end; ++j) {
          p[static_cast<std::size_t>(j)] = exp(p[static_cast<std::size_t>(j)] - largest);
          sum += p[static_cast<std::size_t>(j)];
        }
        for (std::int64_t c = 0; c < d; ++c) {
          T out(0);
          for (std::int64_t j = begin; j < end; ++j) out += p[static_cast<std::size_t>(j)] * v[j * d + c];
          y(t, h * d + c) = out / sum;
        }
      }
  }
};

template <class T>
struct Impl<GatherRows, Reference<T>> {
  static void run(Context<Reference<T>>&, const AnyTensor& table, std::span<const std::int32_t> ids, Matrix<T> y) {
    for (std::size_t i = 0; i < ids.size(); ++i)
      table.copy_to(y.row(static_cast<std::int64_t>(i)), ids[i] * table.shape()[1], table.shape()[1]);
  }
};

template <class T>
struct Impl<Patchify, Reference<T>> {
  static void run(Context<Reference<T>>&, View<const T, 3> pixels, std::int64_t patch, Matrix<T> y) {
    const std::int64_t columns = pixels.extent(2) / patch;
    for (std::int64_t i = 0; i < y.extent(0); ++i)
      for (std::int64_t j = 0; j < y.extent(1); ++j) {
        const std::int64_t c = j / (patch * patch), r = j / patch % patch, s = j % patch;
        y(i, j) = pixels(c, i / columns * patch + r, i % columns * patch + s);
      }
  }
};

template <class T>
struct Impl<AddRows, Reference<T>> {
  static void run(Context<Reference<T>>&, Matrix<T> x, Matrix<const T> addend) {
    for (std::int64_t i = 0; i < x.extent(0); ++i)
      for (std::int64_t j = 0; j < x.extent(1); ++j) x(i, j) += addend(i, j);
  }
};

// ---- training: gradients, and the ops that only it needs -----------------------------------------------------------------

template <class T>
struct Impl<ActivationForward, Reference<T>> {
  static void run(Context<Reference<T>>&, Matrix<const T> z, Activation activation, Matrix<T> y) {
    const std::int64_t n = y.extent(1);
    const bool gated = z.extent(1) != n;
    for (std::int64_t i = 0; i < y.extent(0); ++i)
      for (std::int64_t j = 0; j < n; ++j) {
        const T value = detail::apply_activation(activation, z(i, j));
        y(i, j) = gated ? value * z(i, n + j) : value;
      }
  }
};

template <class T>
struct Impl<ActivationBackward, Reference<T>> {
  static void run(Context<Reference<T>>&, Matrix<const T> dy, Matrix<const T> z, Activation activation, Matrix<T> dz) {
    const std::int64_t n = dy.extent(1);
    const bool gated = z.extent(1) != n;
    for (std::int64_t i = 0; i < dy.extent(0); ++i)
      for (std::int64_t j = 0; j < n; ++j) {
        const T g = dy(i, j), x = z(i, j), slope = detail::activation_derivative(activation, x);
        if (gated) {
          const T up = z(i, n + j);
          dz(i, n + j) = g * (M2LM_FAULT(37) ? x : detail::apply_activation(activation, x));
          dz(i, j) = g * up * slope;
        } else {
          dz(i, j) = g * slope;
        }
      }
  }
};

template <class T>
struct Impl<LinearInputGradient, Reference<T>> {
  static void run(Context<Reference<T>>&, Matrix<const T> dy, const PackedMatrix& w, Matrix<T> dx, bool accumulate) {
    const T* weight = reinterpret_cast<const T*>(w.data.get());
    for (std::int64_t i = 0; i < dx.extent(0); ++i)
      for (std::int64_t k = 0; k < dx.extent(1); ++k) {
        T sum = accumulate ? dx(i, k) : T(0);
        for (std::int64_t j = 0; j < dy.extent(1); ++j) sum += dy(i, j) * weight[j * w.cols + k];
        dx(i, k) = sum;
      }
  }
};

template <class T>
struct Impl<LinearWeightGradient, Reference<T>> {
  static void run(Context<Reference<T>>&, Matrix<const T> x, Matrix<const T> dy, Matrix<T> dw, Vector<T> db) {
    for (std::int64_t j = 0; j < dy.extent(1); ++j)
      for (std::int64_t i = 0; i < dy.extent(0); ++i) {
        if (dw.data())
          for (std::int64_t k = 0; k < x.extent(1); ++k) dw(j, k) += dy(i, j) * x(i, k);
        if (db.data()) db(j) += dy(i, j);
      }
  }
};

template <class T>
struct Impl<RmsNormBackward, Reference<T>> {
  static void run(Context<Reference<T>>&, Matrix<const T> dy, Matrix<const T> x, Vector<const T> weight, double eps, Matrix<T> dx, bool accumulate,
                  Vector<T> dweight) {
    using std::sqrt;
    const T n = T(static_cast<double>(x.extent(1)));
    for (std::int64_t i = 0; i < x.extent(0); ++i) {
      T squares(0), along(0);  // along = Σ g·x: the part of the gradient that only changes the length of x
      for (std::int64_t j = 0; j < x.extent(1); ++j) {
        squares += x(i, j) * x(i, j);
        along += dy(i, j) * weight(j) * x(i, j);
      }
      const T r = T(1) / sqrt(squares / n + T(eps));
      if (M2LM_FAULT(36)) along = T(0);
      for (std::int64_t j = 0; j < x.extent(1); ++j) {
        if (dx.data()) dx(i, j) = (accumulate ? dx(i, j) : T(0)) + r * (dy(i, j) * weight(j) - x(i, j) * r * r * along / n);
        if (dweight.data()) dweight(j) += dy(i, j) * x(i, j) * r;
      }
    }
  }
};

template <class T>
struct Impl<LayerNormBackward, Reference<T>> {
  static void run(Context<Reference<T>>&, Matrix<const T> dy, Matrix<const T> x, Vector<const T> weight, double eps, Matrix<T> dx, bool accumulate,
                  Vector<T> dweight, Vector<T> dbias) {
    using std::sqrt;
    const T n = T(static_cast<double>(x.extent(1)));
    for (std::int64_t i = 0; i < x.extent(0); ++i) {
      T mean(0), variance(0), g_sum(0), along(0);
      for (std::int64_t j = 0; j < x.extent(1); ++j) mean += x(i, j);
      mean = mean / n;
      for (std::int64_t j = 0; j < x.extent(1); ++j) variance += (x(i, j) - mean) * (x(i, j) - mean);
      const T r = T(1) / sqrt(variance / n + T(eps));
      for (std::int64_t j = 0; j < x.extent(1); ++j) {
        const T g = dy(i, j) * weight(j);
        g_sum += g;
        along += g * (x(i, j) - mean) * r;
      }
      for (std::int64_t j = 0; j < x.extent(1); ++j) {
        const T normal = (x(i, j) - mean) * r;
        if (dx.data()) dx(i, j) = (accumulate ? dx(i, j) : T(0)) + r * (dy(i, j) * weight(j) - g_sum / n - normal * along / n);
        if (dweight.data()) dweight(j) += dy(i, j) * normal;
        if (dbias.data()) dbias(j) += dy(i, j);
      }
    }
  }
};

template <class T>
struct Impl<RopeBackward, Reference<T>> {
  static void run(Context<Reference<T>>&, Matrix<T> dx, std::int64_t head_dim, Matrix<const T> cos, Matrix<const T> sin) {
    const std::int64_t half = head_dim / 2;
    for (std::int64_t t = 0; t < dx.extent(0); ++t)
      for (std::int64_t h = 0; h < dx.extent(1); h += head_dim)
        for (std::int64_t i = 0; i < half; ++i) {
          const T a = dx(t, h + i), b = dx(t, h + half + i), s = M2LM_FAULT(33) ? -sin(t, i) : sin(t, i);
          dx(t, h + i) = a * cos(t, i) + b * s;
          dx(t, h + half + i) = b * cos(t, i) - a * s;
        }
  }
};

template <class T>
struct Impl<AttentionBackward, Reference<T>> {
  static void run(Context<Reference<T>>&, Matrix<const T> q, Matrix<const T> k, Matrix<const T> v, Matrix<const T> y, Matrix<const T> dy, std::int64_t d,
                  AttentionMask mask, double scale, Matrix<T> dq, Matrix<T> dk, Matrix<T> dv) {
    using std::exp;
    const std::int64_t keys = k.extent(0), heads = q.extent(1) / d, group = q.extent(1) / k.extent(1);
    for (const Matrix<T>& out : {dq, dk, dv})
      for (std::int64_t i = 0; i < out.extent(0); ++i) std::fill_n(out.row(i), out.extent(1), T(0));
    std::vector<T> p(static_cast<std::size_t>(keys));
    const auto dot = [d](const T* a, const T* b) {
      T sum(0);
      for (std::int64_t c = 0; c < d; ++c) sum += a[c] * b[c];
      return sum;
    };
    for (std::int64_t t = 0; t < q.extent(0); ++t)
      for (std::int64_t h = 0; h < heads; ++h) {
        const auto [begin, end] = detail::visible_keys(mask, t, keys);
        const std::int64_t at = h * d, kv_at = h / group * d;
        T largest(0), sum(0);
        for (std::int64_t j = begin; j < end; ++j) {
          const T s = dot(q.row(t) + at, k.row(j) + kv_at) * T(scale);
          p[static_cast<std::size_t>(j)] = s;
          if (j == begin || s > largest) largest = s;
        }
        for (std::int64_t j = begin; j < end; ++j) {
          p[static_cast<std::size_t>(j)] = exp(p[static_cast<std::size_t>(j)] - largest);
          sum += p[static_cast<std::size_t>(j)];
        }
        // ds = p·(dp − Σ p·dp), and Σ p·dp = dy·y.
        const T mean = M2LM_FAULT(34) ? T(0) : dot(dy.row(t) + at, y.row(t) + at);
        for (std::int64_t j = begin; j < end; ++j) {
          const T weight = p[static_cast<std::size_t>(j)] / sum;
          const T ds = weight * (dot(dy.row(t) + at, v.row(j) + kv_at) - mean) * T(scale);
          const bool skipped = M2LM_FAULT(35) && h % group != 0;
          for (std::int64_t c = 0; c < d; ++c) {
            dq(t, at + c) += ds * k(j, kv_at + c);
            if (skipped) continue;
            dk(j, kv_at + c) += ds * q(t, at + c);
            dv(j, kv_at + c) += weight * dy(t, at + c);
          }
        }
      }
  }
};

template <class T>
struct Impl<ScatterAddRows, Reference<T>> {
  static void run(Context<Reference<T>>&, Matrix<const T> rows, std::span<const std::int32_t> ids, Matrix<T> table) {
    for (std::size_t i = 0; i < ids.size(); ++i)
      for (std::int64_t j = 0; j < table.extent(1); ++j) table(ids[i], j) += rows(static_cast<std::int64_t>(i), j);
  }
};

template <class T>
struct Impl<CrossEntropy, Reference<T>> {
  static void run(Context<Reference<T>>&, Matrix<const T> logits, std::span<const std::int32_t> targets, double scale, Vector<T> losses, Matrix<T> dlogits) {
    using std::exp;
    using std::log;
    const std::int64_t n = logits.extent(1);
    for (std::int64_t i = 0; i < logits.extent(0); ++i) {
      const std::int32_t target = targets[static_cast<std::size_t>(i)];
      const bool ignored = target == ignored_target;
      if (ignored) {
        losses(i) = T(0);
        if (dlogits.data() && !M2LM_FAULT(39)) std::fill_n(dlogits.row(i), n, T(0));
        if (!M2LM_FAULT(39)) continue;
      }
      T largest = logits(i, 0), sum(0);
      for (std::int64_t j = 1; j < n; ++j)
        if (logits(i, j) > largest) largest = logits(i, j);
      for (std::int64_t j = 0; j < n; ++j) sum += exp(logits(i, j) - largest);
      if (!ignored) losses(i) = log(sum) + largest - logits(i, target);
      if (dlogits.data())
        for (std::int64_t j = 0; j < n; ++j) dlogits(i, j) = T(scale) * (exp(logits(i, j) - largest) / sum - (j == target ? T(1) : T(0)));
    }
  }
};

}  // namespace ops
}  // namespace m2lm
