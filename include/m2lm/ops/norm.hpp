// RMSNorm and LayerNorm over the last dimension.
// Floor: ops. May include: core, ops.
#pragma once

#include <m2lm/ops/op.hpp>

namespace m2lm::ops {

struct RmsNorm;
struct LayerNorm;

/// y = x / sqrt(mean(x²) + eps) · weight, row by row. requires x, y [m,n], weight [n]; y may alias x.
/// source: Zhang & Sennrich 2019; LLaMA computes it in f32.
template <class B>
void rms_norm(Context<B>& ctx, Matrix<const ScalarOf<B>> x, Vector<const ScalarOf<B>> weight, double eps, Matrix<ScalarOf<B>> y) {
  require(x.shape() == y.shape(), "m2lm::ops::rms_norm: x is ", x.shape().string(), ", y is ", y.shape().string());
  require(weight.extent(0) == x.extent(1), "m2lm::ops::rms_norm: weight has ", weight.extent(0), " elements, x is ", x.shape().string());
  if (x.elements() != 0) Impl<RmsNorm, B>::run(ctx, x, weight, eps, y);
}

/// y = (x - mean) / sqrt(variance + eps) · weight + bias, row by row. requires x, y [m,n], weight, bias [n]; y may alias x.
template <class B>
void layer_norm(Context<B>& ctx, Matrix<const ScalarOf<B>> x, Vector<const ScalarOf<B>> weight, Vector<const ScalarOf<B>> bias, double eps,
                Matrix<ScalarOf<B>> y) {
  require(x.shape() == y.shape(), "m2lm::ops::layer_norm: x is ", x.shape().string(), ", y is ", y.shape().string());
  require(weight.extent(0) == x.extent(1) && bias.extent(0) == x.extent(1), "m2lm::ops::layer_norm: weight and bias have ", weight.extent(0),
          " and ", bias.extent(0), " elements, x is ", x.shape().string());
  if (x.elements() != 0) Impl<LayerNorm, B>::run(ctx, x, weight, bias, eps, y);
}

}  // namespace m2lm::ops
