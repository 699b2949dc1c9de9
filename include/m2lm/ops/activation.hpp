// Activations on their own, and their gradient. (In a forward pass they are part of the linear op's epilogue.)
// Floor: ops. May include: core, ops.
#pragma once

#include <m2lm/ops/op.hpp>

namespace m2lm::inline M2LM_ABI {

/// Elementwise activations. gelu is the erf form; gelu_tanh is PyTorch's tanh approximation; quick_gelu(x) = x·sigmoid(1.702x).
enum class Activation : std::uint8_t { none, relu, silu, gelu, gelu_tanh, quick_gelu };

namespace ops {

struct ActivationForward;
struct ActivationBackward;

/// y = act(z), or gated, where z has twice the columns of y: y = act(left half of z) · right half.
/// requires z [m,n] or [m,2n], y [m,n]; y may alias z when not gated.
template <class B>
void activation_forward(Context<B>& ctx, Matrix<const ScalarOf<B>> z, Activation activation, Matrix<ScalarOf<B>> y) {
  require(z.extent(0) == y.extent(0) && (z.extent(1) == y.extent(1) || z.extent(1) == 2 * y.extent(1)), "m2lm::ops::activation_forward: z is ",
          z.shape(), ", y is ", y.shape());
  if (y.elements() != 0) Impl<ActivationForward, B>::run(ctx, z, activation, y);
}

/// dz = the gradient of z where y = activation_forward(z) has the gradient dy. The derivative of relu at 0 is 0.
/// requires dy [m,n], z and dz [m,n] or, gated, [m,2n]; dz may alias z, and dy when not gated.
template <class B>
void activation_backward(Context<B>& ctx, Matrix<const ScalarOf<B>> dy, Matrix<const ScalarOf<B>> z, Activation activation, Matrix<ScalarOf<B>> dz) {
  require(z.shape() == dz.shape() && z.extent(0) == dy.extent(0) && (z.extent(1) == dy.extent(1) || z.extent(1) == 2 * dy.extent(1)),
          "m2lm::ops::activation_backward: z is ", z.shape(), ", dz is ", dz.shape(), ", dy is ", dy.shape());
  if (dy.elements() != 0) Impl<ActivationBackward, B>::run(ctx, dy, z, activation, dz);
}

}  // namespace ops
}  // namespace m2lm
