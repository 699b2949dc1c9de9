// Rotary position embedding in the Hugging Face layout: pairs (i, i + head_dim/2).
// Floor: ops. May include: core, ops.
#pragma once

#include <m2lm/ops/op.hpp>

namespace m2lm::inline M2LM_ABI::ops {

struct Rope;
struct RopeBackward;

struct RopeAngles;

/// Rotates each head of x in place: (a, b) → (a·cos − b·sin, b·cos + a·sin) with a = x[i], b = x[i + head_dim/2].
/// requires x [tokens, heads·head_dim], cos and sin [tokens, head_dim/2], head_dim even. source: Su et al. 2021.
template <class B>
void rope(Context<B>& ctx, Matrix<ScalarOf<B>> x, std::int64_t head_dim, Matrix<const AccumulatorOf<B>> cos, Matrix<const AccumulatorOf<B>> sin) {
  require(head_dim > 0 && head_dim % 2 == 0, "m2lm::ops::rope: head_dim = ", head_dim, " is not even");
  require(x.extent(1) % head_dim == 0, "m2lm::ops::rope: x is ", x.shape(), ", head_dim ", head_dim);
  require(cos.extent(0) == x.extent(0) && cos.extent(1) * 2 == head_dim && sin.shape() == cos.shape(), "m2lm::ops::rope: cos is ",
          cos.shape(), ", expected ", Shape{x.extent(0), head_dim / 2});
  if (x.elements() != 0) Impl<Rope, B>::run(ctx, x, head_dim, cos, sin);
}

/// Turns the gradient of rope's output into that of its input, in place: the rotation by the negative angles. requires as rope.
template <class B>
void rope_backward(Context<B>& ctx, Matrix<ScalarOf<B>> dx, std::int64_t head_dim, Matrix<const AccumulatorOf<B>> cos,
                   Matrix<const AccumulatorOf<B>> sin) {
  require(head_dim > 0 && head_dim % 2 == 0 && dx.extent(1) % head_dim == 0, "m2lm::ops::rope_backward: dx is ", dx.shape(), ", head_dim ", head_dim);
  require(cos.extent(0) == dx.extent(0) && cos.extent(1) * 2 == head_dim && sin.shape() == cos.shape(), "m2lm::ops::rope_backward: cos is ",
          cos.shape(), ", expected ", Shape{dx.extent(0), head_dim / 2});
  if (dx.elements() != 0) Impl<RopeBackward, B>::run(ctx, dx, head_dim, cos, sin);
}

}  // namespace m2lm::ops
