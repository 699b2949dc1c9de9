// Packing of weight matrices, and the linear op with its fused epilogue.
// Floor: ops. May include: core, ops.
#pragma once

#include <m2lm/ops/activation.hpp>

#include <span>

namespace m2lm::inline M2LM_ABI {

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
struct LinearInputGradient;
struct LinearWeightGradient;

/// Inputs of a weight: the product of its dimensions after the first.
constexpr std::int64_t columns_of(const Shape& shape) {
  std::int64_t columns = 1;
  for (int i = 1; i < shape.rank(); ++i) columns *= shape[i];
  return columns;
}

/// The format that tensors are packed in when `asked` is wanted. Weights that a checkpoint holds in blocks have no more bits than those:
/// they stay in their blocks, with the same values, unless f32 is asked for or fewer bits (of q8, w8a8's are fewer; q4_128's are the
/// fewest). So a mixed checkpoint keeps its mix. Where q8 and q4 are packed below each other, q8 holds the values of both.
inline DType format_to_pack(std::span<const AnyTensor> sources, DType asked) {
  if (asked == DType::f32) return asked;
  DType held = DType::q4;
  for (const AnyTensor& t : sources) {
    if (!is_block_format(t.dtype())) return asked;
    if (t.dtype() == DType::q8) held = DType::q8;
  }
  return dtype_bytes(asked, group_values) < dtype_bytes(held, group_values) ? asked : held;
}

/// About the bytes of a matrix in a packed form: rows of whole blocks.
inline std::size_t packed_bytes(DType format, const Shape& shape) {
  const std::int64_t columns = columns_of(shape);
  return static_cast<std::size_t>(shape[0]) * (dtype_bytes(format, columns) + (format == DType::w8a8 ? sizeof(float) : 0));
}

/// Packs the rows of `sources` below each other into the backend's form. requires sources of rank >= 2, equal products of the
/// dimensions after the first (the columns), a floating dtype; gated: exactly two sources with equal rows. `format`: what to
/// store (a backend says which it has), unless they hold blocks: see format_to_pack. ensures rows = Σ rows, cols = columns. throws ShapeError.
template <class B>
PackedMatrix pack(Context<B>& ctx, std::span<const AnyTensor> sources, DType format, bool gated = false) {
  require(!sources.empty(), "m2lm::ops::pack: no tensor given");
  for (const AnyTensor& t : sources) {
    require(t.has_value() && t.shape().rank() >= 2, "m2lm::ops::pack: a matrix is needed, not ", t.shape());
    require(columns_of(t.shape()) == columns_of(sources[0].shape()), "m2lm::ops::pack: ", t.shape(), " below ", sources[0].shape());
  }
  if (gated)
    require(sources.size() == 2 && sources[0].shape()[0] == sources[1].shape()[0],
            "m2lm::ops::pack: a gated matrix is made of two with the same number of rows");
  const DType kept = format_to_pack(sources, format);
  if (!ctx.packing) return Impl<Pack, B>::run(ctx, sources, kept, gated);
  PackedMatrix found = ctx.packing->find(sources, kept, gated);
  if (!found.empty()) return found;
  found = Impl<Pack, B>::run(ctx, sources, kept, gated);
  ctx.packing->made(sources, found);
  return found;
}

/// y = act(x·wᵀ + bias) + residual; gated: y = act(first half) · second half (+ residual), with half the columns.
/// requires x [m,k], w [n,k] packed by the same backend; y [m,n] (gated: [m,n/2]); y may alias residual, not x; rows contiguous.
/// reads (m+n)k elements, 2mnk flops. Each output is one sum over k in ascending order: its bits depend on ctx.phase, but not on m or threads.
template <class B>
void linear(Context<B>& ctx, Matrix<const ScalarOf<B>> x, const PackedMatrix& w, const Epilogue<ScalarOf<B>>& epilogue, Matrix<ScalarOf<B>> y) {
  const std::int64_t outputs = w.gated ? w.rows / 2 : w.rows;
  require(x.extent(1) == w.cols, "m2lm::ops::linear: x is ", x.shape(), ", the weight takes ", w.cols, " inputs");
  require(y.extent(0) == x.extent(0) && y.extent(1) == outputs, "m2lm::ops::linear: y is ", y.shape(), ", expected ",
          Shape{x.extent(0), outputs});
  const auto& r = epilogue.residual;
  require(r.data() == nullptr || (r.extent(0) == y.extent(0) && r.extent(1) == outputs), "m2lm::ops::linear: the residual is ",
          r.shape(), ", expected ", y.shape());
  if (y.elements() == 0) return;
  Impl<Linear, B>::run(ctx, x, w, epilogue, y);
}

/// The same with the sums as they are, not rounded to the scalar of a device: logits. No epilogue.
template <class B>
  requires(!std::is_same_v<ScalarOf<B>, AccumulatorOf<B>>)
void linear(Context<B>& ctx, Matrix<const ScalarOf<B>> x, const PackedMatrix& w, Matrix<AccumulatorOf<B>> y) {
  require(x.extent(1) == w.cols && !w.gated, "m2lm::ops::linear: x is ", x.shape(), ", the weight takes ", w.cols, " inputs");
  require(y.extent(0) == x.extent(0) && y.extent(1) == w.rows, "m2lm::ops::linear: y is ", y.shape(), ", expected ", Shape{x.extent(0), w.rows});
  if (y.elements() != 0) Impl<Linear, B>::run(ctx, x, w, y);
}

/// dx = dy·w, or dx += dy·w: the gradient of the input of y = x·wᵀ. w is packed in any format the backend has, so a frozen and
/// quantised weight passes gradients on too. requires dy [m,n], w [n,k] not gated, dx [m,k]; no aliases; rows may be strided.
/// ensures bits that do not depend on m or threads.
template <class B>
void linear_input_gradient(Context<B>& ctx, Matrix<const ScalarOf<B>> dy, const PackedMatrix& w, Matrix<ScalarOf<B>> dx, bool accumulate = false) {
  require(!w.gated, "m2lm::ops::linear_input_gradient: the weight was packed for inference (gated); prepare the layer in a context with a tape");
  require(dy.extent(1) == w.rows && dx.extent(0) == dy.extent(0) && dx.extent(1) == w.cols, "m2lm::ops::linear_input_gradient: dy is ",
          dy.shape(), ", dx is ", dx.shape(), ", the weight is ", Shape{w.rows, w.cols});
  if (dx.elements() != 0) Impl<LinearInputGradient, B>::run(ctx, dy, w, dx, accumulate);
}

/// dw += dyᵀ·x and, where db is not empty, db += Σ rows of dy: the gradients of weight and bias of y = x·wᵀ + bias.
/// requires x [m,k], dy [m,n], dw [n,k] contiguous or empty, db [n] or empty; no aliases; rows of x and dy may be strided.
/// ensures sums over the rows in ascending order: bits that do not depend on threads.
template <class B>
void linear_weight_gradient(Context<B>& ctx, Matrix<const ScalarOf<B>> x, Matrix<const ScalarOf<B>> dy, Matrix<ScalarOf<B>> dw, Vector<ScalarOf<B>> db) {
  require(x.extent(0) == dy.extent(0) && (dw.data() == nullptr || (dw.extent(0) == dy.extent(1) && dw.extent(1) == x.extent(1) && dw.contiguous())) &&
              (db.data() == nullptr || db.extent(0) == dy.extent(1)),
          "m2lm::ops::linear_weight_gradient: x is ", x.shape(), ", dy is ", dy.shape(), ", dw is ", dw.shape(), ", db is ",
          db.shape());
  if (dy.elements() != 0) Impl<LinearWeightGradient, B>::run(ctx, x, dy, dw, db);
}

}  // namespace ops
}  // namespace m2lm
