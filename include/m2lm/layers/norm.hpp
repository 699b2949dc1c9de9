// RmsNorm and LayerNorm with their parameters.
// Floor: layers. May include: core, ops.
#pragma once

#include <m2lm/core/gradients.hpp>
#include <m2lm/ops/norm.hpp>
#include <m2lm/ops/transfer.hpp>

namespace m2lm::inline M2LM_ABI {

/// y = weight · x / √(mean(x²) + eps), row by row.
template <class B>
class RmsNorm {
  using S = ScalarOf<B>;
  Tensor<S> weight_values_;
  double eps_ = 1e-6;

 public:
  Parameter weight;

  RmsNorm() = default;
  /// weight [width] without values; `eps` is added to the mean square.
  RmsNorm(std::int64_t width, double eps) : eps_(eps), weight(Shape{width}) {}

  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("weight", self.weight);
  }
  void prepare(Context<B>& ctx) { weight_values_ = ops::upload_tensor(ctx, weight.value); }

  struct Saved {
    Matrix<const S> x;  // the caller's: it must stay until backward
  };
  /// y = rms_norm(x). requires x, y [m, width]; y may alias x if nothing is saved.
  void forward(Context<B>& ctx, Matrix<const S> x, Matrix<S> y, Saved* saved = nullptr) const {
    ops::rms_norm(ctx, x, std::as_const(weight_values_).template view<1>(), eps_, y);
    if (saved) *saved = {x};
  }
  /// Adds the gradient of a trained weight, and writes that of x to dx, or adds it there; an empty dx: not wanted.
  void backward(Context<B>& ctx, Matrix<const S> dy, const Saved& saved, Gradients<S>& gradients, Matrix<S> dx, bool accumulate = false) const {
    Tensor<S>* dw = gradients.find(weight);
    ops::rms_norm_backward(ctx, dy, saved.x, std::as_const(weight_values_).template view<1>(), eps_, dx, accumulate, dw ? dw->template view<1>() : Vector<S>{});
  }
};

/// y = weight · (x − mean(x)) / √(var(x) + eps) + bias, row by row.
template <class B>
class LayerNorm {
  using S = ScalarOf<B>;
  Tensor<S> weight_values_, bias_values_;
  double eps_ = 1e-5;

 public:
  Parameter weight, bias;

  LayerNorm() = default;
  /// weight and bias [width] without values; `eps` is added to the variance.
  LayerNorm(std::int64_t width, double eps) : eps_(eps), weight(Shape{width}), bias(Shape{width}) {}

  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("weight", self.weight);
    visit("bias", self.bias);
  }
  void prepare(Context<B>& ctx) {
    weight_values_ = ops::upload_tensor(ctx, weight.value);
    bias_values_ = ops::upload_tensor(ctx, bias.value);
  }

  struct Saved {
    Matrix<const S> x;  // the caller's: it must stay until backward
  };
  /// y = layer_norm(x). requires x, y [m, width]; y may alias x if nothing is saved.
  void forward(Context<B>& ctx, Matrix<const S> x, Matrix<S> y, Saved* saved = nullptr) const {
    ops::layer_norm(ctx, x, std::as_const(weight_values_).template view<1>(), std::as_const(bias_values_).template view<1>(), eps_, y);
    if (saved) *saved = {x};
  }
  /// Adds the gradients of trained parameters, and writes that of x to dx, or adds it there; an empty dx: not wanted.
  void backward(Context<B>& ctx, Matrix<const S> dy, const Saved& saved, Gradients<S>& gradients, Matrix<S> dx, bool accumulate = false) const {
    Tensor<S>*dw = gradients.find(weight), *db = gradients.find(bias);
    ops::layer_norm_backward(ctx, dy, saved.x, std::as_const(weight_values_).template view<1>(), eps_, dx, accumulate,
                             dw ? dw->template view<1>() : Vector<S>{}, db ? db->template view<1>() : Vector<S>{});
  }
};

}  // namespace m2lm
