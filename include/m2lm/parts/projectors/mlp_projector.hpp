// The projectors from an encoder's width to the decoder's: MLP, linear, identity.
// Floor: parts. May include: core, ops, layers.
#pragma once

#include <m2lm/layers/linear.hpp>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

namespace m2lm::inline M2LM_ABI {

/// Widths on both sides, and the activation between the layers.
struct ProjectorConfig {
  std::int64_t input_width = 0;              ///< values per row of the encoder
  std::int64_t output_width = 0;             ///< values per row of the decoder
  Activation activation = Activation::gelu;  ///< between layers
  bool bias = true;                          ///< of every layer
  std::optional<int> layers = {};            ///< what the checkpoint says its projector has
};

/// Spec: Depth linear layers with an activation between them. Keys as in LlavaForConditionalGeneration: linear_1, linear_2, ….
template <int Depth>
struct MlpProjector {
  static_assert(Depth >= 1, "m2lm::MlpProjector<Depth>: at least one layer");

  template <class B, Precision P>
  class On {
    using S = ScalarOf<B>;
    ProjectorConfig config_;

   public:
    std::vector<Linear<B>> layers;

    explicit On(const ProjectorConfig& c) : config_(c) {
      require<CheckpointError>(c.layers.value_or(Depth) == Depth, "m2lm::MlpProjector<", Depth, ">: the checkpoint's projector has ", c.layers.value_or(Depth),
                               c.layers == 0 ? " layers; use IdentityProjector" : " layers; use MlpProjector of that depth");
      for (int i = 0; i < Depth; ++i) layers.emplace_back(i == 0 ? c.input_width : c.output_width, c.output_width, c.bias);
    }

    template <class V, class Self>
    static void fields(V&& visit, Self& self) {
      for (std::size_t i = 0; i < self.layers.size(); ++i) visit("linear_" + std::to_string(i + 1), self.layers[i]);
    }

    void prepare(Context<B>& ctx, DType format) {
      for (Linear<B>& layer : layers) layer.prepare(ctx, format);
    }

    /// Rows that `tokens` rows of features become.
    std::int64_t output_tokens(std::int64_t tokens) const { return tokens; }

    struct Saved {
      std::array<Matrix<const S>, Depth> x;      // the input of each layer; the first is the caller's
      std::array<Matrix<const S>, Depth - 1> z;  // what each layer but the last gives, before the activation
    };
    /// requires x [tokens, input_width], y [output_tokens(tokens), output_width].
    void forward(Context<B>& ctx, Matrix<const S> x, Matrix<S> y, Saved* saved = nullptr) const {
      const Arena::Scope scope(ctx.arena);
      Arena& storage = ctx.storage(saved != nullptr);
      const Activation activation = M2LM_FAULT(30) && config_.activation == Activation::gelu ? Activation::gelu_tanh : config_.activation;
      Matrix<const S> input = x;
      for (std::size_t i = 0; i < layers.size(); ++i) {
        const bool last = i + 1 == layers.size();
        const Matrix<S> out = last ? y : storage.template matrix<S>(x.extent(0), config_.output_width);
        if (saved) saved->x[i] = input;
        if (saved && !last) {
          const Matrix<S> z = storage.template matrix<S>(x.extent(0), config_.output_width);
          layers[i].forward(ctx, input, z);
          ops::activation_forward(ctx, Matrix<const S>(z), activation, out);
          saved->z[i] = z;
        } else {
          layers[i].forward(ctx, input, out, last ? Activation::none : activation);
        }
        input = out;
      }
    }
    /// From dy: adds the gradients of trained parameters, and writes that of x to dx unless dx is empty.
    void backward(Context<B>& ctx, Matrix<const S> dy, const Saved& saved, Gradients<S>& gradients, Matrix<S> dx) const {
      const Arena::Scope scope(ctx.arena);
      Matrix<const S> d = dy;
      for (std::size_t i = layers.size(); i-- > 0;) {
        layers[i].parameter_gradients(ctx, saved.x[i], d, gradients);
        if (i == 0) {
          if (dx.data()) layers[0].input_gradient(ctx, d, dx);
          return;
        }
        const Matrix<S> below = ctx.arena.template matrix<S>(d.extent(0), saved.x[i].extent(1));
        layers[i].input_gradient(ctx, d, below);
        ops::activation_backward(ctx, Matrix<const S>(below), saved.z[i - 1], config_.activation, below);
        d = below;
      }
    }
  };
};

/// Spec: one linear layer.
using LinearProjector = MlpProjector<1>;

/// Spec: the features are the embeddings already. requires equal widths.
struct IdentityProjector {
  template <class B, Precision P>
  class On : public NoParameters {
    using S = ScalarOf<B>;

   public:
    explicit On(const ProjectorConfig& c) {
      require(c.input_width == c.output_width, "m2lm::IdentityProjector: the encoder gives ", c.input_width, " values per token, the decoder takes ",
              c.output_width);
    }
    /// As many rows as come in.
    std::int64_t output_tokens(std::int64_t tokens) const { return tokens; }
    struct Saved {};
    /// y = x. requires equal shapes.
    void forward(Context<B>& ctx, Matrix<const S> x, Matrix<S> y, Saved* = nullptr) const { ops::copy_rows(ctx, x, y); }
    /// dx = dy, unless dx is empty.
    void backward(Context<B>& ctx, Matrix<const S> dy, const Saved&, Gradients<S>&, Matrix<S> dx) const {
      if (dx.data()) ops::copy_rows(ctx, dy, dx);
    }
  };
};

}  // namespace m2lm
