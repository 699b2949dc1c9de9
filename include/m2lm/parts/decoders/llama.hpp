// LlamaDecoder: the LLaMA and Mistral family.
// Floor: parts. May include: core, ops, layers.
#pragma once

#include <m2lm/core/config_of.hpp>
#include <m2lm/core/function_ref.hpp>
#include <m2lm/layers/attention.hpp>
#include <m2lm/layers/embedding.hpp>
#include <m2lm/layers/ffn.hpp>
#include <m2lm/layers/norm.hpp>
#include <m2lm/parts/heads/linear_head.hpp>

#include <memory>
#include <span>
#include <utility>
#include <vector>

namespace m2lm {

/// Sizes and constants of config.json.
struct LlamaConfig {
  std::int64_t vocab_size = 0, hidden_size = 0, intermediate_size = 0, num_layers = 0;
  std::int64_t num_heads = 0, num_kv_heads = 0, head_dim = 0;
  std::int64_t max_position_embeddings = 2048;
  std::int64_t sliding_window = 0;  ///< 0 = none
  double rms_norm_eps = 1e-6;
  RopeConfig rope{};
  Activation activation = Activation::silu;
  bool tie_word_embeddings = false, attention_bias = false, mlp_bias = false;
};

/// What changes the code of a decoder block. (Sizes are run-time data.)
struct BlockPolicy {
  friend constexpr bool operator==(const BlockPolicy&, const BlockPolicy&) = default;
};

/// No cross attention. What a hook may have: a `Config` that is read from config.json (then On is made from the decoder's
/// LlamaConfig and it), parameters (canonical names hook.…), prepare, and `derive(ctx, levels)`, which is called once per media
/// instance that has a pyramid; what it returns is kept as CrossFeatures::derived. `after_attention` adds to h [rows, hidden], the
/// rows of all sequences; sequence s has the rows [s.begin, s.begin + s.count) at s.position(row).
struct NoHook {
  template <class B, Precision P>
  struct On : NoParameters {
    void after_attention(Context<B>&, std::int64_t /*layer*/, std::span<const SequenceRows<B>>, Matrix<ScalarOf<B>> /*h*/) const {}
  };
};

/// Spec. source: transformers' LlamaForCausalLM and MistralForCausalLM; keys as there below "model".
template <BlockPolicy policy = BlockPolicy{}, class AfterAttentionHook = NoHook, class Head = LinearHead>
struct LlamaDecoder {
  /// What config.json says about the decoder, its hook and its head.
  struct Config : LlamaConfig {
    ConfigOf<AfterAttentionHook> hook{};
    ConfigOf<Head> head{};

    template <class Root>
    friend void read_config(const Root& root, Config& config) {
      read_config(root, static_cast<LlamaConfig&>(config));
      read_config(root, config.hook);
      read_config(root, config.head);
    }
  };

  template <class B>
  struct Block {
    RmsNorm<B> input_layernorm, post_attention_layernorm;
    CausalAttention<B> self_attn;
    GatedMlp<B> mlp;

    explicit Block(const LlamaConfig& c)
        : input_layernorm(c.hidden_size, c.rms_norm_eps),
          post_attention_layernorm(c.hidden_size, c.rms_norm_eps),
          self_attn(AttentionConfig{.hidden_size = c.hidden_size, .heads = c.num_heads, .kv_heads = c.num_kv_heads, .head_dim = c.head_dim,
                                    .window = c.sliding_window, .qkv_bias = c.attention_bias, .output_bias = c.attention_bias}),
          mlp(c.hidden_size, c.intermediate_size, c.mlp_bias, c.activation) {}

    template <class V, class Self>
    static void fields(V&& visit, Self& self) {
      visit("input_layernorm", self.input_layernorm);
      visit("self_attn", self.self_attn);
      visit("post_attention_layernorm", self.post_attention_layernorm);
      visit("mlp", self.mlp);
    }
  };

  template <class B, Precision P>
  class On {
    using S = ScalarOf<B>;
    LlamaConfig config_;
    std::vector<float> frequencies_;

   public:
    Embedding<B> embed_tokens;
    std::vector<Block<B>> layers;
    RmsNorm<B> norm;
    typename AfterAttentionHook::template On<B, P> hook;
    typename Head::template On<B, P> head;

    explicit On(const LlamaConfig& c) : On(c, {}, {}) {}
    explicit On(const Config& c) : On(c, c.hook, c.head) {}
    On(const LlamaConfig& c, const ConfigOf<AfterAttentionHook>& hook_config, const ConfigOf<Head>& head_config)
        : config_(c),
          frequencies_(rope_frequencies(c.rope, c.head_dim)),
          embed_tokens(c.vocab_size, c.hidden_size),
          norm(c.hidden_size, c.rms_norm_eps),
          hook(make_hook(c, hook_config)),
          head(make_head(c, head_config)) {
      for (std::int64_t i = 0; i < c.num_layers; ++i) layers.emplace_back(c);
    }

    const LlamaConfig& config() const { return config_; }

    template <class V, class Self>
    static void fields(V&& visit, Self& self) {
      visit("model.embed_tokens", self.embed_tokens);
      visit("model.layers", self.layers);
      visit("model.norm", self.norm);
      visit("hook", self.hook);
      visit("lm_head", self.head);
    }

    /// Packs the loaded parameters; `progress(done, total)` after each layer.
    void prepare(Context<B>& ctx, const Precision& precision, FunctionRef<void(std::int64_t, std::int64_t)> progress) {
      const auto total = static_cast<std::int64_t>(layers.size()) + 1;
      std::int64_t done = 0;
      for (Block<B>& block : layers) {
        block.input_layernorm.prepare(ctx);
        block.post_attention_layernorm.prepare(ctx);
        block.self_attn.prepare(ctx, precision.weights);
        block.mlp.prepare(ctx, precision.weights);
        if (progress) progress(++done, total);
      }
      norm.prepare(ctx);
      hook.prepare(ctx, precision.weights);
      head.prepare(ctx, precision.resolve(precision.lm_head), embed_tokens.weight.value);
      if (progress) progress(total, total);
    }

    /// Room for `capacity` positions of this decoder.
    KvCache<B> make_cache(Context<B>& ctx, DType format, std::int64_t capacity) const {
      return KvCache<B>(ctx, format, config_.num_layers, config_.num_kv_heads, config_.head_dim, capacity);
    }

    /// A media instance's pyramid as the hook reads it.
    std::shared_ptr<const CrossFeatures<S>> cross_features([[maybe_unused]] Context<B>& ctx, std::vector<FeatureLevel<S>> levels) const {
      auto out = std::make_shared<CrossFeatures<S>>(std::move(levels));
      if constexpr (requires { hook.derive(ctx, std::span<const FeatureLevel<S>>(out->levels)); })
        out->set_derived(hook.derive(ctx, std::span<const FeatureLevel<S>>(out->levels)));
      return out;
    }

    /// Runs all blocks over h [rows, hidden], in place, and advances the caches. The rows of a sequence follow its cached
    /// positions. `tap(layer, h)` sees the input of every block and, as the last, the output of the last (before the norm).
    void forward(Context<B>& ctx, Matrix<S> h, std::span<const SequenceRows<B>> sequences, FunctionRef<void(std::int64_t, Matrix<const S>)> tap = {}) const {
      const Arena::Scope scope(ctx.arena);
      const std::int64_t rows = h.extent(0);
      for (const SequenceRows<B>& s : sequences)
        require<CapacityError>(s.cache->length() + s.count <= s.cache->capacity(), "m2lm: the context holds ", s.cache->capacity(), " positions, but ",
                               s.cache->length() + s.count, " are needed (", s.cache->length(), " so far and ", s.count, " more)");
      const Matrix<S> x = ctx.arena.template matrix<S>(rows, config_.hidden_size);
      const Matrix<S> cos = ctx.arena.template matrix<S>(rows, config_.head_dim / 2), sin = ctx.arena.template matrix<S>(rows, config_.head_dim / 2);
      for (const SequenceRows<B>& s : sequences)
        rope_angles<S>(frequencies_, s.cache->length(), cos.rows(s.begin, s.begin + s.count), sin.rows(s.begin, s.begin + s.count));
      std::int64_t layer = 0;
      for (const Block<B>& block : layers) {
        if (tap) tap(layer, h);
        block.input_layernorm.forward(ctx, h, x);
        block.self_attn.forward(ctx, layer, x, sequences, cos, sin, h);
        hook.after_attention(ctx, layer, sequences, h);
        block.post_attention_layernorm.forward(ctx, h, x);
        block.mlp.forward(ctx, x, h);
        ++layer;
      }
      if (tap) tap(layer, h);
      for (const SequenceRows<B>& s : sequences) s.cache->advance(s.count);
    }

   private:
    using HookOn = typename AfterAttentionHook::template On<B, P>;
    using HeadOn = typename Head::template On<B, P>;
    static HookOn make_hook([[maybe_unused]] const LlamaConfig& c, [[maybe_unused]] const ConfigOf<AfterAttentionHook>& config) {
      if constexpr (std::is_same_v<ConfigOf<AfterAttentionHook>, NoConfig>)
        return HookOn();
      else
        return HookOn(c, config);
    }
    static HeadOn make_head(const LlamaConfig& c, [[maybe_unused]] const ConfigOf<Head>& config) {
      if constexpr (std::is_same_v<ConfigOf<Head>, NoConfig>)
        return HeadOn(c.hidden_size, c.vocab_size, c.tie_word_embeddings);
      else
        return HeadOn(c.hidden_size, c.vocab_size, c.tie_word_embeddings, config);
    }
  };
};

}  // namespace m2lm
