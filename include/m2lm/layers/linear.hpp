// Linear: a weight matrix with an optional bias, packed for a backend.
// Floor: layers. May include: core, ops.
#pragma once

#include <m2lm/core/gradients.hpp>
#include <m2lm/ops/activation.hpp>
#include <m2lm/ops/gather.hpp>
#include <m2lm/ops/linear.hpp>
#include <m2lm/ops/transfer.hpp>

#include <initializer_list>
#include <vector>

namespace m2lm::inline M2LM_ABI {

/// Weight [outputs, inputs] and bias [outputs] of a checkpoint, and what a backend derives from them.
/// source: torch.nn.Linear's layout; a convolution whose kernel equals its stride has weight [outputs, channels, k, k].
template <class B>
class Linear {
  using S = ScalarOf<B>;
  /// A low-rank update of some of the outputs.
  struct Update {
    std::int64_t begin = 0;
    PackedMatrix a, b;  // b with the scale in it
  };
  PackedMatrix packed_;
  Tensor<S> bias_values_;
  std::vector<Update> updates_;

 public:
  Parameter weight, bias;

  Linear() = default;
  /// Parameters without values: weight [outputs, inputs], bias [outputs].
  Linear(std::int64_t inputs, std::int64_t outputs, bool has_bias) : Linear(Shape{outputs, inputs}, has_bias) {}
  /// The same with a weight of any rank whose first extent is the outputs (a convolution over patches).
  Linear(Shape weight_shape, bool has_bias) : weight(weight_shape) {
    if (has_bias) bias = Parameter(Shape{weight_shape[0]});
  }

  /// Whether a bias belongs to it.
  bool has_bias() const { return bias.shape.rank() == 1; }
  /// Columns of y.
  std::int64_t outputs() const { return weight.shape[0]; }

  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("weight", self.weight);
    if (self.has_bias()) visit("bias", self.bias);
  }

  /// Packs the loaded weight. requires weight (and bias) present.
  void prepare(Context<B>& ctx, DType format) { fuse(ctx, format, {this}); }

  /// Packs several layers with the same inputs below each other, so that one product serves them all.
  /// gated: two layers, evaluated as act(first) · second.
  void fuse(Context<B>& ctx, DType format, std::initializer_list<const Linear*> parts, bool gated = false) {
    std::vector<AnyTensor> weights;
    std::int64_t rows = 0;
    bool any_bias = false;
    for (const Linear* part : parts) {
      weights.push_back(part->weight.value);
      rows += part->outputs();
      any_bias = any_bias || part->has_bias();
    }
    packed_ = ops::pack(ctx, std::span<const AnyTensor>(weights), format, gated);
    pack_updates(ctx, parts);
    require(updates_.empty() || !gated, "m2lm::Linear: a gated product has no place for an adapter's update");
    if (!any_bias) return;
    Tensor<HostScalarOf<B>> biases(Shape{rows});
    std::int64_t row = 0;
    for (const Linear* part : parts) {
      if (part->has_bias()) part->bias.value.copy_to(biases.data() + row, 0, part->outputs());
      row += part->outputs();
    }
    if constexpr (HostBackend<B>)
      bias_values_ = std::move(biases);
    else
      bias_values_ = ops::upload_tensor(ctx, AnyTensor(std::move(biases)));
  }

  /// y = act(x·wᵀ + bias) + residual. requires prepare or fuse; shapes as ops::linear.
  void forward(Context<B>& ctx, Matrix<const S> x, Matrix<S> y, Activation activation = Activation::none, Matrix<const S> residual = {}) const {
    if (!updates_.empty()) return forward_updated(ctx, x, y, activation, residual);
    ops::linear(ctx, x, packed_, Epilogue<S>{.bias = bias_values_.data(), .activation = activation, .residual = residual}, y);
  }

  /// y = x·wᵀ, not rounded to the scalar of a device. requires no bias and no adapter beside the weight.
  void forward(Context<B>& ctx, Matrix<const S> x, Matrix<AccumulatorOf<B>> y) const
    requires(!std::is_same_v<S, AccumulatorOf<B>>)
  {
    require(updates_.empty() && bias_values_.empty(), "m2lm::Linear: a product of full precision has no place for a bias or an adapter; load the adapter merged");
    ops::linear(ctx, x, packed_, y);
  }

  /// The weight as the backend has it; empty before `prepare`.
  const PackedMatrix& packed() const { return packed_; }

  struct Saved {
    Matrix<const S> x;  // the caller's: it must stay until backward
  };
  /// The same without activation and residual, for training.
  void forward(Context<B>& ctx, Matrix<const S> x, Matrix<S> y, Saved* saved) const {
    forward(ctx, x, y);
    if (saved) *saved = {x};
  }
  /// From dy, the gradient of x·wᵀ + bias: adds those of weight and bias where they are trained, and writes that of x to dx
  /// unless dx is empty.
  void backward(Context<B>& ctx, Matrix<const S> dy, const Saved& saved, Gradients<S>& gradients, Matrix<S> dx) const {
    parameter_gradients(ctx, saved.x, dy, gradients);
    if (dx.data()) input_gradient(ctx, dy, dx);
  }
  /// The two halves of backward.
  void input_gradient(Context<B>& ctx, Matrix<const S> dy, Matrix<S> dx) const {
    require(updates_.empty(), "m2lm::Linear: an adapter beside the weights has no gradient yet; load it merged");
    ops::linear_input_gradient(ctx, dy, packed_, dx);
  }
  /// The other half: adds dyᵀ·x to the gradient of weight and the sum of dy's rows to that of bias, where they are trained.
  void parameter_gradients(Context<B>& ctx, Matrix<const S> x, Matrix<const S> dy, Gradients<S>& gradients) const {
    parameter_gradients(ctx, x, dy, gradients.find(weight), has_bias() ? gradients.find(bias) : nullptr);
  }
  /// The second for a fused product: `parts` as they were given to `fuse`, dy [rows, Σ outputs].
  static void parameter_gradients(Context<B>& ctx, Matrix<const S> x, Matrix<const S> dy, Gradients<S>& gradients, std::initializer_list<const Linear*> parts) {
    std::int64_t column = 0;
    for (const Linear* part : parts) {
      part->parameter_gradients(ctx, x, dy.columns(column, column + part->outputs()), gradients);
      column += part->outputs();
    }
  }
  /// Whether weight or bias has a gradient.
  bool is_trained(const Gradients<S>& gradients) const { return gradients.trains(weight) || (has_bias() && gradients.trains(bias)); }

  /// Into tensors of the caller's, null where a gradient is not wanted (a weight that belongs to somebody else: tied heads).
  static void parameter_gradients(Context<B>& ctx, Matrix<const S> x, Matrix<const S> dy, Tensor<S>* dw, Tensor<S>* db) {
    if (dw || db) ops::linear_weight_gradient(ctx, x, dy, dw ? gradient_matrix(*dw) : Matrix<S>{}, db ? db->template view<1>() : Vector<S>{});
  }

 private:
  void pack_updates(Context<B>& ctx, std::initializer_list<const Linear*> parts) {
    updates_.clear();
    std::int64_t row = 0;
    for (const Linear* part : parts) {
      if (const LowRankUpdate* u = part->weight.update.get()) {
        Tensor<double> scaled = u->b.template to<double>();
        for (double& x : scaled.span()) x *= u->scale;
        const AnyTensor a = u->a, b(std::move(scaled));
        constexpr DType format = HostBackend<B> ? DType::f32 : dtype_of<S>;
        updates_.push_back({row, ops::pack(ctx, std::span<const AnyTensor>(&a, 1), format), ops::pack(ctx, std::span<const AnyTensor>(&b, 1), format)});
      }
      row += part->outputs();
    }
  }
  void forward_updated(Context<B>& ctx, Matrix<const S> x, Matrix<S> y, Activation activation, Matrix<const S> residual) const {
    const Arena::Scope scope(ctx.arena);
    const bool direct = activation == Activation::none;
    const Matrix<S> z = direct ? y : ctx.arena.template matrix<S>(y.extent(0), y.extent(1));
    ops::linear(ctx, x, packed_, Epilogue<S>{.bias = bias_values_.data(), .activation = Activation::none, .residual = direct ? residual : Matrix<const S>{}}, z);
    for (const Update& u : updates_) {
      const Matrix<S> low = ctx.arena.template matrix<S>(x.extent(0), u.a.rows);
      const Matrix<S> part = z.columns(u.begin, u.begin + u.b.rows);
      ops::linear(ctx, x, u.a, Epilogue<S>{}, low);
      ops::linear(ctx, Matrix<const S>(low), u.b, Epilogue<S>{.bias = nullptr, .activation = Activation::none, .residual = part}, part);
    }
    if (direct) return;
    ops::activation_forward(ctx, Matrix<const S>(z), activation, z);
    if (residual.data()) ops::add_rows(ctx, z, residual);
    ops::copy_rows(ctx, Matrix<const S>(z), y);
  }
};

}  // namespace m2lm
