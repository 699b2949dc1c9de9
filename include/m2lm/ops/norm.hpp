// RMSNorm and LayerNorm over the last dimension, and their gradients.
// Floor: ops. May include: core, ops.
#pragma once

#include <m2lm/ops/op.hpp>

namespace m2lm::inline M2LM_ABI::ops {

struct RmsNorm;
struct LayerNorm;
struct RmsNormBackward;
struct LayerNormBackward;

/// y = x / sqrt(mean(x²) + eps) · weight, row by row. requires x, y [m,n], weight [n]; y may alias x.
/// source: Zhang & Sennrich 2019; LLaMA computes it in f32.
template <class B>
void rms_norm(Context<B>& ctx, Matrix<const ScalarOf<B>> x, Vector<const ScalarOf<B>> weight, double eps, Matrix<ScalarOf<B>> y) {
  require(x.shape() == y.shape(), "m2lm::ops::rms_norm: x is ", x.shape(), ", y is ", y.shape());
  require(weight.extent(0) == x.extent(1), "m2lm::ops::rms_norm: weight has ", weight.extent(0), " elements, x is ", x.shape());
  if (x.elements() != 0) Impl<RmsNorm, B>::run(ctx, x, weight, eps, y);
}

/// y = (x - mean) / sqrt(variance + eps) · weight + bias, row by row. requires x, y [m,n], weight, bias [n]; y may alias x.
template <class B>
void layer_norm(Context<B>& ctx, Matrix<const ScalarOf<B>> x, Vector<const ScalarOf<B>> weight, Vector<const ScalarOf<B>> bias, double eps,
                Matrix<ScalarOf<B>> y) {
  require(x.shape() == y.shape(), "m2lm::ops::layer_norm: x is ", x.shape(), ", y is ", y.shape());
  require(weight.extent(0) == x.extent(1) && bias.extent(0) == x.extent(1), "m2lm::ops::layer_norm: weight and bias have ", weight.extent(0),
          " and ", bias.extent(0), " elements, x is ", x.shape());
  if (x.elements() != 0) Impl<LayerNorm, B>::run(ctx, x, weight, bias, eps, y);
}

/// Gradients of y = rms_norm(x) from dy; the statistics are computed again from x. With r = 1/sqrt(mean(x²) + eps) and g = dy·weight:
/// dx (+)= r·(g − x·r²·mean(g·x)), where dx is not empty; dweight += Σ rows of dy·x·r, where it is not empty.
/// requires dy, x [m,n], weight [n], dx [m,n] or empty, dweight [n] or empty; dx aliases neither dy nor x.
/// ensures sums over rows in an order that does not depend on threads.
template <class B>
void rms_norm_backward(Context<B>& ctx, Matrix<const ScalarOf<B>> dy, Matrix<const ScalarOf<B>> x, Vector<const ScalarOf<B>> weight, double eps,
                       Matrix<ScalarOf<B>> dx, bool accumulate, Vector<ScalarOf<B>> dweight) {
  require(x.shape() == dy.shape() && (dx.data() == nullptr || dx.shape() == x.shape()), "m2lm::ops::rms_norm_backward: x is ", x.shape(),
          ", dy is ", dy.shape(), ", dx is ", dx.shape());
  require(weight.extent(0) == x.extent(1) && (dweight.data() == nullptr || dweight.extent(0) == x.extent(1)), "m2lm::ops::rms_norm_backward: weight has ",
          weight.extent(0), " elements, dweight ", dweight.extent(0), ", x is ", x.shape());
  if (x.elements() != 0) Impl<RmsNormBackward, B>::run(ctx, dy, x, weight, eps, dx, accumulate, dweight);
}

/// The same for y = layer_norm(x). With r = 1/sqrt(variance + eps), n = (x − mean)·r and g = dy·weight:
/// dx (+)= r·(g − mean(g) − n·mean(g·n)); dweight += Σ rows of dy·n; dbias += Σ rows of dy.
template <class B>
void layer_norm_backward(Context<B>& ctx, Matrix<const ScalarOf<B>> dy, Matrix<const ScalarOf<B>> x, Vector<const ScalarOf<B>> weight, double eps,
                         Matrix<ScalarOf<B>> dx, bool accumulate, Vector<ScalarOf<B>> dweight, Vector<ScalarOf<B>> dbias) {
  require(x.shape() == dy.shape() && (dx.data() == nullptr || dx.shape() == x.shape()), "m2lm::ops::layer_norm_backward: x is ", x.shape(),
          ", dy is ", dy.shape(), ", dx is ", dx.shape());
  require(weight.extent(0) == x.extent(1) && (dweight.data() == nullptr || dweight.extent(0) == x.extent(1)) &&
              (dbias.data() == nullptr || dbias.extent(0) == x.extent(1)),
          "m2lm::ops::layer_norm_backward: weight has ", weight.extent(0), " elements, dweight ", dweight.extent(0), ", dbias ", dbias.extent(0), ", x is ",
          x.shape());
  if (x.elements() != 0) Impl<LayerNormBackward, B>::run(ctx, dy, x, weight, eps, dx, accumulate, dweight, dbias);
}

}  // namespace m2lm::ops
