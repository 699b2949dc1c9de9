// The feed-forward layers: gated (LLaMA) and plain (vision encoders).
// Floor: layers. May include: core, ops.
#pragma once

#include <m2lm/layers/linear.hpp>

namespace m2lm::inline M2LM_ABI {

/// down(act(gate(x)) · up(x)). Keys: gate_proj, up_proj, down_proj.
template <class B>
class GatedMlp {
  using S = ScalarOf<B>;
  Linear<B> gate_up_;
  Activation activation_ = Activation::silu;

 public:
  Linear<B> gate_proj, up_proj, down_proj;

  GatedMlp() = default;
  /// Parameters without values: gate_proj and up_proj [intermediate, hidden], down_proj [hidden, intermediate].
  GatedMlp(std::int64_t hidden_size, std::int64_t intermediate_size, bool bias, Activation activation)
      : activation_(activation),
        gate_proj(hidden_size, intermediate_size, bias),
        up_proj(hidden_size, intermediate_size, bias),
        down_proj(intermediate_size, hidden_size, bias) {}

  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("gate_proj", self.gate_proj);
    visit("up_proj", self.up_proj);
    visit("down_proj", self.down_proj);
  }
  /// In a training context, or with an adapter, the gate is packed beside `up`, not interleaved with it: its product is needed.
  void prepare(Context<B>& ctx, DType format) {
    gate_up_.fuse(ctx, format, {&gate_proj, &up_proj}, ctx.tape == nullptr && !gate_proj.weight.update && !up_proj.weight.update);
    down_proj.prepare(ctx, format);
  }

  struct Saved {
    Matrix<const S> x;  // the caller's
    Matrix<const S> z;  // gate(x) and up(x) side by side
  };
  /// h += mlp(x). requires x, h [rows, hidden].
  void forward(Context<B>& ctx, Matrix<const S> x, Matrix<S> h, Saved* saved = nullptr) const {
    const Arena::Scope scope(ctx.arena);
    const Matrix<S> inner = ctx.arena.template matrix<S>(x.extent(0), gate_proj.outputs());
    if (gate_up_.packed().gated) {
      require(saved == nullptr, "m2lm::GatedMlp: packed for inference; prepare the layer in a context with a tape");
      gate_up_.forward(ctx, x, inner, activation_);
    } else {
      const Matrix<S> z = ctx.storage(saved != nullptr).template matrix<S>(x.extent(0), 2 * gate_proj.outputs());
      gate_up_.forward(ctx, x, z);
      ops::activation_forward(ctx, Matrix<const S>(z), activation_, inner);
      if (saved) *saved = {x, z};
    }
    down_proj.forward(ctx, inner, h, Activation::none, h);
  }
  /// From dh, the gradient of the h that forward left: adds those of trained parameters, and writes that of x to dx unless dx is
  /// empty. (dh is also the gradient of the h that forward found.)
  void backward(Context<B>& ctx, Matrix<const S> dh, const Saved& saved, Gradients<S>& gradients, Matrix<S> dx) const {
    const Arena::Scope scope(ctx.arena);
    const Matrix<S> inner = ctx.arena.template matrix<S>(dh.extent(0), gate_proj.outputs()), dz = ctx.arena.template matrix<S>(dh.extent(0), saved.z.extent(1));
    if (down_proj.is_trained(gradients)) {
      ops::activation_forward(ctx, saved.z, activation_, inner);  // cheaper to do again than to keep
      down_proj.parameter_gradients(ctx, inner, dh, gradients);
    }
    down_proj.input_gradient(ctx, dh, inner);
    ops::activation_backward(ctx, Matrix<const S>(inner), saved.z, activation_, dz);
    Linear<B>::parameter_gradients(ctx, saved.x, dz, gradients, {&gate_proj, &up_proj});
    if (dx.data()) gate_up_.input_gradient(ctx, dz, dx);
  }
};

/// fc2(act(fc1(x))). Keys: fc1, fc2, with biases.
template <class B>
class Mlp {
  using S = ScalarOf<B>;
  Activation activation_ = Activation::quick_gelu;

 public:
  Linear<B> fc1, fc2;

  Mlp() = default;
  /// Parameters without values: fc1 [intermediate, hidden], fc2 [hidden, intermediate], both with a bias.
  Mlp(std::int64_t hidden_size, std::int64_t intermediate_size, Activation activation)
      : activation_(activation), fc1(hidden_size, intermediate_size, true), fc2(intermediate_size, hidden_size, true) {}

  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("fc1", self.fc1);
    visit("fc2", self.fc2);
  }
  void prepare(Context<B>& ctx, DType format) {
    fc1.prepare(ctx, format);
    fc2.prepare(ctx, format);
  }

  struct Saved {
    Matrix<const S> x;  // the caller's
    Matrix<const S> z;  // fc1(x)
  };
  /// h += mlp(x). requires x, h [rows, hidden].
  void forward(Context<B>& ctx, Matrix<const S> x, Matrix<S> h, Saved* saved = nullptr) const {
    const Arena::Scope scope(ctx.arena);
    const Matrix<S> inner = ctx.arena.template matrix<S>(x.extent(0), fc1.outputs());
    if (saved) {
      const Matrix<S> z = ctx.storage(true).template matrix<S>(x.extent(0), fc1.outputs());
      fc1.forward(ctx, x, z);
      ops::activation_forward(ctx, Matrix<const S>(z), activation_, inner);
      *saved = {x, z};
    } else {
      fc1.forward(ctx, x, inner, activation_);
    }
    fc2.forward(ctx, inner, h, Activation::none, h);
  }
  /// As GatedMlp::backward.
  void backward(Context<B>& ctx, Matrix<const S> dh, const Saved& saved, Gradients<S>& gradients, Matrix<S> dx) const {
    const Arena::Scope scope(ctx.arena);
    const Matrix<S> inner = ctx.arena.template matrix<S>(dh.extent(0), fc1.outputs());
    if (fc2.is_trained(gradients)) {
      ops::activation_forward(ctx, saved.z, activation_, inner);
      fc2.parameter_gradients(ctx, inner, dh, gradients);
    }
    fc2.input_gradient(ctx, dh, inner);
    ops::activation_backward(ctx, Matrix<const S>(inner), saved.z, activation_, inner);
    fc1.parameter_gradients(ctx, saved.x, inner, gradients);
    if (dx.data()) fc1.input_gradient(ctx, inner, dx);
  }
};

}  // namespace m2lm
