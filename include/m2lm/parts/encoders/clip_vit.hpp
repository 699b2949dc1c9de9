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

namespace m2lm::inline M2LM_ABI {

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

/// Which hidden state of the tower is given, and which of its rows.
struct VitPolicy {
  int feature_layer = layer_from_checkpoint;            ///< as transformers counts hidden_states: 0 = embeddings, -1 = last
  VitFeatures features = VitFeatures::from_checkpoint;  ///< the class token, patches, or both
  friend constexpr bool operator==(const VitPolicy&, const VitPolicy&) = default;
};

/// Sizes and constants of config.json's vision_config.
struct ClipVisionConfig {
  std::int64_t hidden_size = 0;                    ///< values per patch
  std::int64_t intermediate_size = 0;              ///< values per patch inside the MLP
  std::int64_t num_layers = 0;                     ///< num_hidden_layers
  std::int64_t num_heads = 0;                      ///< num_attention_heads
  std::int64_t image_size = 224;                   ///< pixels of a side
  std::int64_t patch_size = 32;                    ///< pixels of a patch's side
  std::int64_t num_channels = 3;                   ///< of the preprocessed picture
  std::int64_t projection_dim = 0;                 ///< values per row of VitFeatures::projected and projected_tokens
  double layer_norm_eps = 1e-5;                    ///< of all norms
  Activation activation = Activation::quick_gelu;  ///< hidden_act
  int feature_layer = -2;                          ///< the checkpoint's choice
  VitFeatures features = VitFeatures::patches;     ///< the checkpoint's choice
};

/// Spec. source: transformers' CLIPVisionModelWithProjection; keys as there.
template <VitPolicy policy = VitPolicy{}>
struct ClipVit {
  using Input = Image;
  using Config = ClipVisionConfig;

  /// One layer: h += attention(norm(h)), h += mlp(norm(h)).
  template <class B>
  struct Block {
    using S = ScalarOf<B>;
    LayerNorm<B> layer_norm1, layer_norm2;
    FullAttention<B> self_attn;
    Mlp<B> mlp;

    /// Parameters without values.
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
    void prepare(Context<B>& ctx, DType format) {
      layer_norm1.prepare(ctx);
      layer_norm2.prepare(ctx);
      self_attn.prepare(ctx, format);
      mlp.prepare(ctx, format);
    }

    struct Saved {
      typename LayerNorm<B>::Saved layer_norm1, layer_norm2;
      typename FullAttention<B>::Saved self_attn;
      typename Mlp<B>::Saved mlp;
    };
    /// h += self_attn(layer_norm1(h)), then h += mlp(layer_norm2(h)). requires h [tokens, hidden]; keys and values in `format`.
    void forward(Context<B>& ctx, DType format, Matrix<S> h, Saved* saved = nullptr) const {
      const Arena::Scope scope(ctx.arena);
      const bool keep = saved != nullptr;
      Arena& storage = ctx.storage(keep);
      const Matrix<S> x = storage.template matrix<S>(h.extent(0), h.extent(1)), x2 = keep ? storage.template matrix<S>(h.extent(0), h.extent(1)) : x;
      layer_norm1.forward(ctx, ctx.keep(h, keep), x, keep ? &saved->layer_norm1 : nullptr);
      self_attn.forward(ctx, format, x, h, keep ? &saved->self_attn : nullptr);
      layer_norm2.forward(ctx, ctx.keep(h, keep), x2, keep ? &saved->layer_norm2 : nullptr);
      mlp.forward(ctx, x2, h, keep ? &saved->mlp : nullptr);
    }
    /// Turns dh, the gradient of the block's output, into that of its input, and adds those of trained parameters.
    void backward(Context<B>& ctx, Matrix<S> dh, const Saved& saved, Gradients<S>& gradients) const {
      const Arena::Scope scope(ctx.arena);
      const Matrix<S> dx = ctx.arena.template matrix<S>(dh.extent(0), dh.extent(1));
      mlp.backward(ctx, dh, saved.mlp, gradients, dx);
      layer_norm2.backward(ctx, dx, saved.layer_norm2, gradients, dh, true);
      self_attn.backward(ctx, dh, saved.self_attn, gradients, dx);
      layer_norm1.backward(ctx, dx, saved.layer_norm1, gradients, dh, true);
    }
  };

  template <class B, Precision P>
  class On {
    using S = ScalarOf<B>;
    ClipVisionConfig config_;
    VitFeatures features_;
    std::int64_t blocks_to_run_;
    DType format_ = DType::native;  // of keys and values
    Tensor<S> class_row_, position_values_;  // class_row_: the class embedding at its position

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

    /// What it was made from.
    const ClipVisionConfig& config() const { return config_; }
    /// Values per output token.
    std::int64_t width() const { return projects() ? config_.projection_dim : config_.hidden_size; }
    /// Output tokens of an image. (The argument is there for encoders whose number of tokens depends on the input.)
    std::int64_t tokens(const Tensor<float>& /*pixels*/) const { return tokens(); }
    /// The same: every picture has been brought to one size.
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
      format_ = plain_format(format, plain_format_on<B>);
      using Host = HostScalarOf<B>;
      Tensor<Host> class_row(Shape{1, config_.hidden_size}), first(Shape{1, config_.hidden_size});
      class_embedding.value.copy_to(class_row.data(), 0, config_.hidden_size);
      position_embedding.value.copy_to(first.data(), 0, config_.hidden_size);
      for (std::int64_t j = 0; j < config_.hidden_size; ++j) class_row.data()[j] = class_row.data()[j] + first.data()[j];
      class_row_ = ops::upload_tensor(ctx, AnyTensor(std::move(class_row)));
      position_values_ = ops::upload_tensor(ctx, position_embedding.value);
      patch_embedding.prepare(ctx, format);
      pre_layrnorm.prepare(ctx);
      for (Block<B>& block : layers) block.prepare(ctx, format);
      if (pools()) post_layernorm.prepare(ctx);
      if (projects()) visual_projection.prepare(ctx, format);
    }

    struct Saved {
      Matrix<const S> patches;  // what patch_embedding reads
      typename LayerNorm<B>::Saved pre_layrnorm, post_layernorm;
      std::vector<typename Block<B>::Saved> layers;
      typename Linear<B>::Saved visual_projection;
    };
    /// requires image [channels, image_size, image_size], normalised, features [tokens(), width()].
    /// `tap(layer, h)` sees hidden_states as transformers numbers them: 0 = after pre_layrnorm, i = after block i.
    void forward(Context<B>& ctx, const Tensor<float>& image, Matrix<S> features, FunctionRef<void(std::int64_t, Matrix<const S>)> tap = {},
                 Saved* saved = nullptr) const {
      const View<const float, 3> pixels = image.view<3>();
      require<InputError>(pixels.extent(0) == config_.num_channels && pixels.extent(1) == config_.image_size && pixels.extent(2) == config_.image_size,
                          "m2lm::ClipVit: pixels are ", pixels.shape(), ", the encoder takes ",
                          Shape{config_.num_channels, config_.image_size, config_.image_size});
      require(features.extent(0) == tokens() && features.extent(1) == width(), "m2lm::ClipVit: features are ", features.shape(), ", expected ",
              Shape{tokens(), width()});
      const Arena::Scope scope(ctx.arena);
      const std::int64_t patches = position_embedding.shape[0] - 1, d = config_.hidden_size;
      Arena& storage = ctx.storage(saved != nullptr);
      const Matrix<S> h = storage.template matrix<S>(patches + 1, d), embedded = saved ? storage.template matrix<S>(patches + 1, d) : h;
      embed(ctx, pixels, embedded, saved);
      pre_layrnorm.forward(ctx, embedded, h, saved ? &saved->pre_layrnorm : nullptr);
      if (tap) tap(0, h);
      if (saved) saved->layers.resize(layers.size());
      for (std::size_t i = 0; i < layers.size(); ++i) {
        layers[i].forward(ctx, format_, h, saved ? &saved->layers[i] : nullptr);
        if (tap) tap(static_cast<std::int64_t>(i) + 1, h);
      }
      if (pools()) {
        const Matrix<S> pooled = storage.template matrix<S>(1, d);
        post_layernorm.forward(ctx, h.rows(0, 1), pooled, saved ? &saved->post_layernorm : nullptr);
        write(ctx, pooled, features, saved);
      } else {
        write(ctx, M2LM_FAULT(22) && first_row() == 1 ? h.rows(0, patches) : h.rows(first_row(), patches + 1), features, saved);
      }
    }
    /// From the gradient of the features: adds those of trained parameters. (That of the pixels is not computed.)
    void backward(Context<B>& ctx, Matrix<const S> dfeatures, const Saved& saved, Gradients<S>& gradients) const {
      require(dfeatures.extent(0) == tokens() && dfeatures.extent(1) == width(), "m2lm::ClipVit: the gradient of the features is ", dfeatures.shape(),
              ", expected ", Shape{tokens(), width()});
      const Arena::Scope scope(ctx.arena);
      const std::int64_t rows = position_embedding.shape[0], d = config_.hidden_size;
      const Matrix<S> dh = ctx.arena.template matrix<S>(rows, d), handed_on = pools() ? ctx.arena.template matrix<S>(1, d) : dh.rows(first_row(), rows);
      ops::zero(ctx, dh.data(), dh.elements());
      if (projects())
        visual_projection.backward(ctx, dfeatures, saved.visual_projection, gradients, handed_on);
      else
        ops::copy_rows(ctx, dfeatures, handed_on);
      if (pools()) post_layernorm.backward(ctx, handed_on, saved.post_layernorm, gradients, dh.rows(0, 1));
      const bool embeddings_trained = gradients.trains(class_embedding) || gradients.trains(position_embedding) || patch_embedding.is_trained(gradients) ||
                                      gradients.trains(pre_layrnorm);
      const std::size_t last = embeddings_trained ? 0 : first_trained(layers, gradients);
      for (std::size_t i = layers.size(); i-- > last;) layers[i].backward(ctx, dh, saved.layers[i], gradients);
      if (!embeddings_trained) return;
      const Matrix<S> dembedded = ctx.arena.template matrix<S>(rows, d);
      pre_layrnorm.backward(ctx, dh, saved.pre_layrnorm, gradients, dembedded);
      if (Tensor<S>* g = gradients.find(class_embedding)) ops::add_rows(ctx, Matrix<S>(g->data(), {1, d}), Matrix<const S>(dembedded.rows(0, 1)));
      if (Tensor<S>* g = gradients.find(position_embedding)) ops::add_rows(ctx, g->template view<2>(), Matrix<const S>(dembedded));
      patch_embedding.parameter_gradients(ctx, saved.patches, dembedded.rows(1, rows), gradients);
    }

   private:
    /// Which row of the hidden states is the first of the features.
    std::int64_t first_row() const { return features_ == VitFeatures::all_tokens ? 0 : 1; }

    void embed(Context<B>& ctx, View<const float, 3> pixels, Matrix<S> h, Saved* saved) const {
      const Arena::Scope scope(ctx.arena);
      const std::int64_t patches = h.extent(0) - 1, inputs = config_.num_channels * config_.patch_size * config_.patch_size;
      const Matrix<S> cut = ctx.storage(saved != nullptr).template matrix<S>(patches, inputs);
      if (saved) saved->patches = cut;
      const View<S, 3> converted(ctx.arena.template take<S>(pixels.elements()), pixels.extents());
      ops::upload(ctx, std::span<const float>(pixels.data(), static_cast<std::size_t>(pixels.elements())), converted.data());
      ops::patchify(ctx, View<const S, 3>(converted), config_.patch_size, cut);
      const Matrix<const S> positions = position_values_.template view<2>();
      ops::copy_rows(ctx, class_row_.template view<2>(), h.rows(0, 1));
      patch_embedding.forward(ctx, cut, h.rows(1, patches + 1), Activation::none, positions.rows(1, patches + 1));
    }
    void write(Context<B>& ctx, Matrix<const S> h, Matrix<S> features, Saved* saved) const {
      if (projects())
        visual_projection.forward(ctx, h, features, saved ? &saved->visual_projection : nullptr);
      else
        ops::copy_rows(ctx, h, features);
    }
  };
};

}  // namespace m2lm
