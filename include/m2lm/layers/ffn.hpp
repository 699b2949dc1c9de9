// The feed-forward layers: gated (LLaMA) and plain (vision encoders).
// Floor: layers. May include: core, ops.
#pragma once

#include <m2lm/layers/linear.hpp>

namespace m2lm {

/// down(act(gate(x)) · up(x)). Keys: gate_proj, up_proj, down_proj.
template <class B>
class GatedMlp {
  using S = ScalarOf<B>;
  Linear<B> gate_up_;
  Activation activation_ = Activation::silu;

 public:
  Linear<B> gate_proj, up_proj, down_proj;

  GatedMlp() = default;
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
  void prepare(Context<B>& ctx, DType format) {
    gate_up_.fuse(ctx, format, {&gate_proj, &up_proj}, true);
    down_proj.prepare(ctx, format);
  }

  /// h += mlp(x). requires x, h [rows, hidden].
  void forward(Context<B>& ctx, Matrix<const S> x, Matrix<S> h) const {
    const Arena::Scope scope(ctx.arena);
    const Matrix<S> inner = ctx.arena.template matrix<S>(x.extent(0), gate_proj.outputs());
    gate_up_.forward(ctx, x, inner, activation_);
    down_proj.forward(ctx, inner, h, Activation::none, h);
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

  /// h += mlp(x). requires x, h [rows, hidden].
  void forward(Context<B>& ctx, Matrix<const S> x, Matrix<S> h) const {
    const Arena::Scope scope(ctx.arena);
    const Matrix<S> inner = ctx.arena.template matrix<S>(x.extent(0), fc1.outputs());
    fc1.forward(ctx, x, inner, activation_);
    fc2.forward(ctx, inner, h, Activation::none, h);
  }
};

}  // namespace m2lm
