// The projectors from an encoder's width to the decoder's: MLP, linear, identity.
// Floor: parts. May include: core, ops, layers.
#pragma once

#include <m2lm/layers/linear.hpp>

#include <algorithm>
#include <string>
#include <vector>

namespace m2lm {

/// Widths on both sides, and the activation between the layers.
struct ProjectorConfig {
  std::int64_t input_width = 0, output_width = 0;
  Activation activation = Activation::gelu;
  bool bias = true;
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

    /// requires x [tokens, input_width], y [output_tokens(tokens), output_width].
    void forward(Context<B>& ctx, Matrix<const S> x, Matrix<S> y) const {
      const Arena::Scope scope(ctx.arena);
      Matrix<const S> input = x;
      for (std::size_t i = 0; i < layers.size(); ++i) {
        const bool last = i + 1 == layers.size();
        const Matrix<S> out = last ? y : ctx.arena.template matrix<S>(x.extent(0), config_.output_width);
        const Activation activation = M2LM_FAULT(30) && config_.activation == Activation::gelu ? Activation::gelu_tanh : config_.activation;
        layers[i].forward(ctx, input, out, last ? Activation::none : activation);
        input = out;
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
    std::int64_t output_tokens(std::int64_t tokens) const { return tokens; }
    void forward(Context<B>&, Matrix<const S> x, Matrix<S> y) const {
      for (std::int64_t i = 0; i < x.extent(0); ++i) std::copy_n(x.row(i), x.extent(1), y.row(i));
    }
  };
};

}  // namespace m2lm
