// RmsNorm and LayerNorm with their parameters.
// Floor: layers. May include: core, ops.
#pragma once

#include <m2lm/core/fields.hpp>
#include <m2lm/ops/norm.hpp>

namespace m2lm {

template <class B>
class RmsNorm {
  using S = ScalarOf<B>;
  Tensor<S> weight_values_;
  double eps_ = 1e-6;

 public:
  Parameter weight;

  RmsNorm() = default;
  RmsNorm(std::int64_t width, double eps) : eps_(eps), weight(Shape{width}) {}

  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("weight", self.weight);
  }
  void prepare(Context<B>&) { weight_values_ = weight.value.template to<S>(); }

  /// y = rms_norm(x). requires x, y [m, width]; y may alias x.
  void forward(Context<B>& ctx, Matrix<const S> x, Matrix<S> y) const {
    ops::rms_norm(ctx, x, std::as_const(weight_values_).template view<1>(), eps_, y);
  }
};

template <class B>
class LayerNorm {
  using S = ScalarOf<B>;
  Tensor<S> weight_values_, bias_values_;
  double eps_ = 1e-5;

 public:
  Parameter weight, bias;

  LayerNorm() = default;
  LayerNorm(std::int64_t width, double eps) : eps_(eps), weight(Shape{width}), bias(Shape{width}) {}

  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("weight", self.weight);
    visit("bias", self.bias);
  }
  void prepare(Context<B>&) {
    weight_values_ = weight.value.template to<S>();
    bias_values_ = bias.value.template to<S>();
  }

  /// y = layer_norm(x). requires x, y [m, width]; y may alias x.
  void forward(Context<B>& ctx, Matrix<const S> x, Matrix<S> y) const {
    ops::layer_norm(ctx, x, std::as_const(weight_values_).template view<1>(), std::as_const(bias_values_).template view<1>(), eps_, y);
  }
};

}  // namespace m2lm
