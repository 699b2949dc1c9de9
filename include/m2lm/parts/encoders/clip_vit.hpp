// ClipVit: the CLIP vision transformer.
// Floor: parts. May include: core, ops, layers.
#pragma once

#include <m2lm/core/function_ref.hpp>
#include <m2lm/fwd.hpp>
#include <m2lm/layers/attention.hpp>
#include <m2lm/layers/ffn.hpp>
#include <m2lm/layers/norm.hpp>
#include <m2lm/ops/gather.hpp>

#include <algorithm>
#include <vector>

namespace m2lm {

/// What the encoder hands on. `from_checkpoint`: what config.json says (vision_feature_select_strategy), else `patches`.
enum class VitFeatures : std::uint8_t {
  from_checkpoint,
  patches,           ///< hidden states of the chosen layer without the CLS token
  all_tokens,        ///< … with it
  pooled,            ///< post_layernorm of the last layer's CLS token: pooler_output
  projected,         ///< visual_projection of pooled: image_embeds
  projected_tokens,  ///< visual_projection of every token of the last layer, not normed, without CLS (M2LM)
};

/// A layer index that stands for config.json's vision_feature_layer, else -2.
inline constexpr int layer_from_checkpoint = -1000;

struct VitPolicy {
  int feature_layer = layer_from_checkpoint;  ///< as transformers counts hidden_states: 0 = embeddings, -1 = last
  VitFeatures features = VitFeatures::from_checkpoint;
  friend constexpr bool operator==(const VitPolicy&, const VitPolicy&) = default;
};

/// Sizes and constants of config.json's vision_config.
struct ClipVisionConfig {
  std::int64_t hidden_size = 0, intermediate_size = 0, num_layers = 0, num_heads = 0;
  std::int64_t image_size = 224, patch_size = 32, num_channels = 3, projection_dim = 0;
  double layer_norm_eps = 1e-5;
  Activation activation = Activation::quick_gelu;
  int feature_layer = -2;                           ///< the checkpoint's choice
  VitFeatures features = VitFeatures::patches;  ///< the checkpoint's choice
};

/// Spec. source: transformers' CLIPVisionModelWithProjection; keys as there.
template <VitPolicy policy = VitPolicy{}>
struct ClipVit {
  using Input = Image;
  using Config = ClipVisionConfig;

  template <class B>
  struct Block {
    LayerNorm<B> layer_norm1, layer_norm2;
    FullAttention<B> self_attn;
    Mlp<B> mlp;

    explicit Block(const ClipVisionConfig& c)
        : layer_norm1(c.hidden_size, c.layer_norm_eps),
          layer_norm2(c.hidden_size, c.layer_norm_eps),
          self_attn(AttentionConfig{.hidden_size = c.hidden_size, .heads = c.num_heads, .kv_heads = c.num_heads,
                                    .head_dim = c.hidden_size / c.num_heads, .window = 0, .qkv_bias = true, .output_bias = true}),
          mlp(c.hidden_size, c.intermediate_size, c.activation) {}

    template <class V, class Self>
    static void fields(V&& visit, Self& self) {
      visit("self_attn", self.self_attn);
      visit("layer_norm1", self.layer_norm1);
      visit("mlp", self.mlp);
      visit("layer_norm2", self.layer_norm2);
    }
  };

  template <class B, Precision P>
  class On {
    using S = ScalarOf<B>;
    ClipVisionConfig config_;
    VitFeatures features_;
    std::int64_t blocks_to_run_;
    DType format_ = DType::native;
    Tensor<S> class_values_, position_values_;

    bool needs_last() const { return features_ != VitFeatures::patches && features_ != VitFeatures::all_tokens; }
    bool pools() const { return features_ == VitFeatures::pooled || features_ == VitFeatures::projected; }
    bool projects() const { return features_ == VitFeatures::projected || features_ == VitFeatures::projected_tokens; }

   public:
    Parameter class_embedding, position_embedding;
    Linear<B> patch_embedding;
    LayerNorm<B> pre_layrnorm;  // spelled as in the checkpoints
    std::vector<Block<B>> layers;
    LayerNorm<B> post_layernorm;
    Linear<B> visual_projection;

    explicit On(const ClipVisionConfig& c)
        : config_(c),
          features_(policy.features == VitFeatures::from_checkpoint ? c.features : policy.features),
          blocks_to_run_(0),
          class_embedding(Shape{c.hidden_size}),
          patch_embedding(Shape{c.hidden_size, c.num_channels, c.patch_size, c.patch_size}, false),
          pre_layrnorm(c.hidden_size, c.layer_norm_eps),
          post_layernorm(c.hidden_size, c.layer_norm_eps),
          visual_projection(c.hidden_size, c.projection_dim, false) {
      const std::int64_t wanted = needs_last() ? -1 : (policy.feature_layer == layer_from_checkpoint ? c.feature_layer : policy.feature_layer);
      blocks_to_run_ = wanted < 0 ? c.num_layers + (M2LM_FAULT(25) ? 0 : 1) + wanted : wanted;
      require<OptionError>(blocks_to_run_ >= 0 && blocks_to_run_ <= c.num_layers, "m2lm::ClipVit: feature layer ", wanted, " of an encoder with ",
                           c.num_layers, " layers");
      require<CheckpointError>(c.patch_size > 0 && c.image_size >= c.patch_size, "m2lm::ClipVit: patches of ", c.patch_size, " in an image of ",
                               c.image_size, " pixels");
      const std::int64_t grid = c.image_size / c.patch_size;
      position_embedding = Parameter(Shape{grid * grid + 1, c.hidden_size});
      // Blocks behind the chosen layer are neither loaded nor run.
      for (std::int64_t i = 0; i < blocks_to_run_; ++i) layers.emplace_back(c);
    }

    const ClipVisionConfig& config() const { return config_; }
    /// Values per output token.
    std::int64_t width() const { return projects() ? config_.projection_dim : config_.hidden_size; }
    /// Output tokens of an image. (The argument is there for encoders whose number of tokens depends on the input.)
    std::int64_t tokens(const Tensor<float>& /*pixels*/) const { return tokens(); }
    std::int64_t tokens() const {
      const std::int64_t patches = position_embedding.shape[0] - 1;
      if (pools()) return 1;
      return features_ == VitFeatures::all_tokens ? patches + 1 : patches;
    }

    template <class V, class Self>
    static void fields(V&& visit, Self& self) {
      visit("vision_model.embeddings.class_embedding", self.class_embedding);
      visit("vision_model.embeddings.patch_embedding", self.patch_embedding);
      visit("vision_model.embeddings.position_embedding.weight", self.position_embedding);
      visit("vision_model.pre_layrnorm", self.pre_layrnorm);
      visit("vision_model.encoder.layers", self.layers);
      if (self.pools()) visit("vision_model.post_layernorm", self.post_layernorm);
      if (self.projects()) visit("visual_projection", self.visual_projection);
    }

    void prepare(Context<B>& ctx, DType format) {
      format_ = format;
      class_values_ = class_embedding.value.template to<S>();
      position_values_ = position_embedding.value.template to<S>();
      patch_embedding.prepare(ctx, format);
      pre_layrnorm.prepare(ctx);
      for (Block<B>& block : layers) {
        block.layer_norm1.prepare(ctx);
        block.layer_norm2.prepare(ctx);
        block.self_attn.prepare(ctx, format);
        block.mlp.prepare(ctx, format);
      }
      if (pools()) post_layernorm.prepare(ctx);
      if (projects()) visual_projection.prepare(ctx, format);
    }

    /// requires image [channels, image_size, image_size], normalised, features [tokens(), width()].
    /// `tap(layer, h)` sees hidden_states as transformers numbers them: 0 = after pre_layrnorm, i = after block i.
    void forward(Context<B>& ctx, const Tensor<float>& image, Matrix<S> features, FunctionRef<void(std::int64_t, Matrix<const S>)> tap = {}) const {
      const View<const float, 3> pixels = image.view<3>();
      require<InputError>(pixels.extent(0) == config_.num_channels && pixels.extent(1) == config_.image_size && pixels.extent(2) == config_.image_size,
                          "m2lm::ClipVit: pixels are ", pixels.shape().string(), ", the encoder takes ",
                          Shape{config_.num_channels, config_.image_size, config_.image_size}.string());
      require(features.extent(0) == tokens() && features.extent(1) == width(), "m2lm::ClipVit: features are ", features.shape().string(), ", expected ",
              Shape{tokens(), width()}.string());
      const Arena::Scope scope(ctx.arena);
      const std::int64_t patches = position_embedding.shape[0] - 1, d = config_.hidden_size;
      const Matrix<S> h = ctx.arena.template matrix<S>(patches + 1, d), x = ctx.arena.template matrix<S>(patches + 1, d);
      embed(ctx, pixels, h);
      pre_layrnorm.forward(ctx, h, h);
      if (tap) tap(0, h);
      std::int64_t layer = 0;
      for (const Block<B>& block : layers) {
        block.layer_norm1.forward(ctx, h, x);
        block.self_attn.forward(ctx, format_, x, h);
        block.layer_norm2.forward(ctx, h, x);
        block.mlp.forward(ctx, x, h);
        if (tap) tap(++layer, h);
      }
      const std::int64_t first = features_ == VitFeatures::all_tokens ? 0 : 1;
      if (pools()) {
        post_layernorm.forward(ctx, h.rows(0, 1), x.rows(0, 1));
        write(ctx, x.rows(0, 1), features);
      } else {
        write(ctx, M2LM_FAULT(22) && first == 1 ? h.rows(0, patches) : h.rows(first, patches + 1), features);
      }
    }

   private:
    void embed(Context<B>& ctx, View<const float, 3> pixels, Matrix<S> h) const {
      const Arena::Scope scope(ctx.arena);
      const std::int64_t patches = h.extent(0) - 1, inputs = config_.num_channels * config_.patch_size * config_.patch_size;
      const Matrix<S> cut = ctx.arena.template matrix<S>(patches, inputs);
      const View<S, 3> converted(ctx.arena.template take<S>(pixels.elements()), pixels.extents());
      for (std::int64_t c = 0; c < pixels.extent(0); ++c)
        for (std::int64_t i = 0; i < pixels.extent(1); ++i)
          for (std::int64_t j = 0; j < pixels.extent(2); ++j) converted(c, i, j) = static_cast<S>(pixels(c, i, j));
      ops::patchify(ctx, View<const S, 3>(converted), config_.patch_size, cut);
      const Matrix<const S> positions = position_values_.template view<2>();
      for (std::int64_t j = 0; j < h.extent(1); ++j) h(0, j) = class_values_.data()[j] + positions(0, j);
      patch_embedding.forward(ctx, cut, h.rows(1, patches + 1), Activation::none, positions.rows(1, patches + 1));
    }
    void write(Context<B>& ctx, Matrix<const S> h, Matrix<S> features) const {
      if (projects())
        visual_projection.forward(ctx, h, features);
      else
        for (std::int64_t i = 0; i < h.extent(0); ++i) std::copy_n(h.row(i), h.extent(1), features.row(i));
    }
  };
};

}  // namespace m2lm
