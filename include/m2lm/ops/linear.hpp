// Packing of weight matrices, and the linear op with its fused epilogue.
// Floor: ops. May include: core, ops.
#pragma once

#include <m2lm/ops/op.hpp>

#include <span>

namespace m2lm {

/// Elementwise activations. gelu is the erf form; gelu_tanh is PyTorch's tanh approximation; quick_gelu(x) = x·sigmoid(1.702x).
enum class Activation : std::uint8_t { none, relu, silu, gelu, gelu_tanh, quick_gelu };

/// What happens to x·wᵀ before it is stored, in this order: + bias, activation, (gated: · second half), + residual.
template <class S>
struct Epilogue {
  const S* bias = nullptr;                   ///< [n], or null
  Activation activation = Activation::none;  ///< on a gated matrix: of the first half only
  Matrix<const S> residual{};                ///< [m, outputs], or empty
};

namespace ops {

struct Pack;
struct Linear;

/// Inputs of a weight: the product of its dimensions after the first.
constexpr std::int64_t columns_of(const Shape& shape) {
  std::int64_t columns = 1;
  for (int i = 1; i < shape.rank(); ++i) columns *= shape[i];
  return columns;
}

/// Packs the rows of `sources` below each other into the backend's form. requires sources of rank >= 2, equal products of the
/// dimensions after the first (the columns), a floating dtype; gated: exactly two sources with equal rows. `format`: what to
/// store (a backend says which it has). ensures rows = Σ rows, cols = columns. throws ShapeError.
template <class B>
PackedMatrix pack(Context<B>& ctx, std::span<const AnyTensor> sources, DType format, bool gated = false) {
  require(!sources.empty(), "m2lm::ops::pack: no tensor given");
  for (const AnyTensor& t : sources) {
    require(t.has_value() && t.shape().rank() >= 2, "m2lm::ops::pack: a matrix is needed, not ", t.shape().string());
    require(columns_of(t.shape()) == columns_of(sources[0].shape()), "m2lm::ops::pack: ", t.shape().string(), " below ", sources[0].shape().string());
  }
  if (gated)
    require(sources.size() == 2 && sources[0].shape()[0] == sources[1].shape()[0],
            "m2lm::ops::pack: a gated matrix is made of two with the same number of rows");
  return Impl<Pack, B>::run(ctx, sources, format, gated);
}

/// y = act(x·wᵀ + bias) + residual; gated: y = act(first half) · second half (+ residual), with half the columns.
/// requires x [m,k], w [n,k] packed by the same backend; y [m,n] (gated: [m,n/2]); y may alias residual, not x; rows contiguous.
/// reads (m+n)k elements, 2mnk flops. Each output is one sum over k in ascending order: its bits do not depend on m or threads.
template <class B>
void linear(Context<B>& ctx, Matrix<const ScalarOf<B>> x, const PackedMatrix& w, const Epilogue<ScalarOf<B>>& epilogue, Matrix<ScalarOf<B>> y) {
  const std::int64_t outputs = w.gated ? w.rows / 2 : w.rows;
  require(x.extent(1) == w.cols, "m2lm::ops::linear: x is ", x.shape().string(), ", the weight takes ", w.cols, " inputs");
  require(y.extent(0) == x.extent(0) && y.extent(1) == outputs, "m2lm::ops::linear: y is ", y.shape().string(), ", expected ",
          Shape{x.extent(0), outputs}.string());
  const auto& r = epilogue.residual;
  require(r.data() == nullptr || (r.extent(0) == y.extent(0) && r.extent(1) == outputs), "m2lm::ops::linear: the residual is ",
          r.shape().string(), ", expected ", y.shape().string());
  if (y.elements() == 0) return;
  Impl<Linear, B>::run(ctx, x, w, epilogue, y);
}

}  // namespace ops
}  // namespace m2lm
