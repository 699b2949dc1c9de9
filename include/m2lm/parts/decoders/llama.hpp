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
#include <type_traits>
#include <utility>
#include <vector>

namespace m2lm::inline M2LM_ABI {

/// Sizes and constants of config.json.
struct LlamaConfig {
  std::int64_t vocab_size = 0;                  ///< rows of the embedding table, columns of the logits
  std::int64_t hidden_size = 0;                 ///< values per position
  std::int64_t intermediate_size = 0;           ///< values per position inside the MLP
  std::int64_t num_layers = 0;                  ///< num_hidden_layers
  std::int64_t num_heads = 0;                   ///< num_attention_heads
  std::int64_t num_kv_heads = 0;                ///< num_key_value_heads; where it is missing num_heads, Mistral 8
  std::int64_t head_dim = 0;                    ///< values per head; hidden_size / num_heads where it is missing
  std::int64_t max_position_embeddings = 2048;  ///< the context length of a session that asks for none
  std::int64_t sliding_window = 0;              ///< keys that a query sees; 0 = all before it
  double rms_norm_eps = 1e-6;                   ///< of all norms
  RopeConfig rope{};                            ///< rotary angles
  Activation activation = Activation::silu;     ///< hidden_act, of the MLP's gate
  bool tie_word_embeddings = false;             ///< the head's weight is the embedding table
  bool attention_bias = false;                  ///< of q, k, v and o
  bool mlp_bias = false;                        ///< of gate, up and down
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
    /// Adds nothing.
    void after_attention(Context<B>&, std::int64_t /*layer*/, std::span<const SequenceRows<B>>, Matrix<ScalarOf<B>> /*h*/) const {}
  };
};

namespace detail {

/// A component that keeps what its backward pass needs.
template <class ComponentOn>
concept Differentiable = requires { typename ComponentOn::Saved; };

struct NothingSaved {
  struct Saved {};
};

}  // namespace detail

/// Spec. source: transformers' LlamaForCausalLM and MistralForCausalLM; keys as there below "model".
template <BlockPolicy policy = BlockPolicy{}, class AfterAttentionHook = NoHook, class Head = LinearHead>
struct LlamaDecoder {
  /// What config.json says about the decoder, its hook and its head.
  struct Config : LlamaConfig {
    ConfigOf<AfterAttentionHook> hook{};  ///< of a hook without one: empty
    ConfigOf<Head> head{};                ///< of a head without one: empty

    template <class Root>
    friend void read_config(const Root& root, Config& config) {
      read_config(root, static_cast<LlamaConfig&>(config));
      read_config(root, config.hook);
      read_config(root, config.head);
    }
  };

  /// One layer: h += attention(norm(h)), the hook, h += mlp(norm(h)).
  template <class B>
  struct Block {
    using S = ScalarOf<B>;
    RmsNorm<B> input_layernorm, post_attention_layernorm;
    CausalAttention<B> self_attn;
    GatedMlp<B> mlp;

    /// Parameters without values.
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
    void prepare(Context<B>& ctx, DType format) {
      input_layernorm.prepare(ctx);
      post_attention_layernorm.prepare(ctx);
      self_attn.prepare(ctx, format);
      mlp.prepare(ctx, format);
    }

    struct Saved {
      typename RmsNorm<B>::Saved input_layernorm, post_attention_layernorm;
      typename CausalAttention<B>::Saved self_attn;
      typename GatedMlp<B>::Saved mlp;
    };
    /// h += self_attn(input_layernorm(h)), then `between(h)`, then h += mlp(post_attention_layernorm(h)). Shapes as CausalAttention.
    template <class Between>
    void forward(Context<B>& ctx, std::int64_t layer, std::span<const SequenceRows<B>> sequences, Matrix<const AccumulatorOf<B>> cos,
                 Matrix<const AccumulatorOf<B>> sin, Matrix<S> h, Between&& between, Saved* saved = nullptr) const {
      const Arena::Scope scope(ctx.arena);
      const bool keep = saved != nullptr;
      Arena& storage = ctx.storage(keep);
      const Matrix<S> x = storage.template matrix<S>(h.extent(0), h.extent(1)), x2 = keep ? storage.template matrix<S>(h.extent(0), h.extent(1)) : x;
      input_layernorm.forward(ctx, ctx.keep(h, keep), x, keep ? &saved->input_layernorm : nullptr);
      self_attn.forward(ctx, layer, x, sequences, cos, sin, h, keep ? &saved->self_attn : nullptr);
      between(h);
      post_attention_layernorm.forward(ctx, ctx.keep(h, keep), x2, keep ? &saved->post_attention_layernorm : nullptr);
      mlp.forward(ctx, x2, h, keep ? &saved->mlp : nullptr);
    }
    /// Turns dh, the gradient of the block's output, into that of its input, and adds those of trained parameters.
    /// `between(dh)` adds what the gradient of forward's `between` adds.
    template <class Between>
    void backward(Context<B>& ctx, Matrix<S> dh, const Saved& saved, Gradients<S>& gradients, Between&& between) const {
      const Arena::Scope scope(ctx.arena);
      const Matrix<S> dx = ctx.arena.template matrix<S>(dh.extent(0), dh.extent(1));
      mlp.backward(ctx, dh, saved.mlp, gradients, dx);
      post_attention_layernorm.backward(ctx, dx, saved.post_attention_layernorm, gradients, dh, !M2LM_FAULT(38));
      between(dh);
      self_attn.backward(ctx, dh, saved.self_attn, gradients, dx);
      input_layernorm.backward(ctx, dx, saved.input_layernorm, gradients, dh, true);
    }
  };

  template <class B, Precision P>
  class On {
    using S = ScalarOf<B>;
    using HookOn = typename AfterAttentionHook::template On<B, P>;
    using HeadOn = typename Head::template On<B, P>;
    LlamaConfig config_;
    RopeFrequencies<B> frequencies_;

   public:
    Embedding<B> embed_tokens;
    std::vector<Block<B>> layers;
    RmsNorm<B> norm;
    HookOn hook;
    HeadOn head;

    explicit On(const LlamaConfig& c) : On(c, {}, {}) {}
    explicit On(const Config& c) : On(c, c.hook, c.head) {}
    On(const LlamaConfig& c, const ConfigOf<AfterAttentionHook>& hook_config, const ConfigOf<Head>& head_config)
        : config_(c),
          frequencies_(c.rope, c.head_dim),
          embed_tokens(c.vocab_size, c.hidden_size),
          norm(c.hidden_size, c.rms_norm_eps),
          hook(make_hook(c, hook_config)),
          head(make_head(c, head_config)) {
      for (std::int64_t i = 0; i < c.num_layers; ++i) layers.emplace_back(c);
    }

    /// What it was made from.
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
      frequencies_.prepare(ctx);
      embed_tokens.prepare(ctx);
      for (Block<B>& block : layers) {
        block.prepare(ctx, precision.weights);
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

    struct Saved {
      std::vector<typename Block<B>::Saved> layers;
      typename RmsNorm<B>::Saved norm;
      typename std::conditional_t<detail::Differentiable<HeadOn>, HeadOn, detail::NothingSaved>::Saved head;
    };
    /// Runs all blocks over h [rows, hidden], in place, and advances the caches. The rows of a sequence follow its cached
    /// positions. `tap(layer, h)` sees the input of every block and, as the last, the output of the last (before the norm).
    /// With `saved`, sequences are whole and have no cache; `sequences` must stay until backward.
    void forward(Context<B>& ctx, Matrix<S> h, std::span<const SequenceRows<B>> sequences, FunctionRef<void(std::int64_t, Matrix<const S>)> tap = {},
                 Saved* saved = nullptr) const {
      const Arena::Scope scope(ctx.arena);
      const std::int64_t rows = h.extent(0);
      for (const SequenceRows<B>& s : sequences)
        if (s.cache)
          require<CapacityError>(s.cache->length() + s.count <= s.cache->capacity(), "m2lm: the context holds ", s.cache->capacity(), " positions, but ",
                               s.cache->length() + s.count, " are needed (", s.cache->length(), " so far and ", s.count, " more)");
      Arena& storage = ctx.storage(saved != nullptr);
      using A = AccumulatorOf<B>;
      const Matrix<A> cos = storage.template matrix<A>(rows, config_.head_dim / 2), sin = storage.template matrix<A>(rows, config_.head_dim / 2);
      for (const SequenceRows<B>& s : sequences)
        frequencies_.angles(ctx, s.first(), s.device_length(), cos.rows(s.begin, s.begin + s.count), sin.rows(s.begin, s.begin + s.count));
      if (saved) saved->layers.resize(layers.size());
      std::int64_t layer = 0;
      for (const Block<B>& block : layers) {
        if (tap) tap(layer, h);
        const auto after_attention = [&](Matrix<S> rows_of_h) { hook.after_attention(ctx, layer, sequences, rows_of_h); };
        block.forward(ctx, layer, sequences, cos, sin, h, after_attention, saved ? &saved->layers[static_cast<std::size_t>(layer)] : nullptr);
        ++layer;
      }
      if (tap) tap(layer, h);
      for (const SequenceRows<B>& s : sequences)
        if (s.cache) s.cache->advance(s.count);
    }
    /// Turns dh, the gradient of the h that forward left, into that of the h it found, and adds those of trained parameters. With
    /// wants_input false it ends at the lowest trained block, and dh is then of no use.
    void backward(Context<B>& ctx, Matrix<S> dh, const Saved& saved, Gradients<S>& gradients, bool wants_input = true) const {
      static_assert(std::is_same_v<AfterAttentionHook, NoHook>, "m2lm: the hook of this decoder has no gradient; train the decoder without a hook");
      const std::size_t last = wants_input ? 0 : first_trained(layers, gradients);
      for (std::size_t i = layers.size(); i-- > last;) layers[i].backward(ctx, dh, saved.layers[i], gradients, [](Matrix<S>) {});
    }

    /// logits = head(norm(h)). requires h [rows, hidden], logits [rows, vocabulary]. With `saved`, h must stay until the gradient.
    /// In every phase the head rounds as in a step: the last row of a prompt has the logits that a session samples from.
    void predict(Context<B>& in, Matrix<const S> h, Matrix<AccumulatorOf<B>> logits, Saved* saved = nullptr) const {
      Context<B> ctx = in;
      ctx.phase = Phase::decode;
      const Arena::Scope scope(ctx.arena);
      const Matrix<S> x = ctx.storage(saved != nullptr).template matrix<S>(h.extent(0), h.extent(1));
      norm.forward(ctx, h, x, saved ? &saved->norm : nullptr);
      if (M2LM_FAULT(26)) ops::copy_rows(ctx, h, x);
      if constexpr (detail::Differentiable<HeadOn>) {
        head.forward(ctx, x, logits, saved ? &saved->head : nullptr);
      } else {
        head.forward(ctx, x, logits);
      }
    }
    /// dh = the gradient of predict's h, from that of its logits; adds those of trained parameters (of a tied head: to the table's).
    void predict_backward(Context<B>& ctx, Matrix<const S> dlogits, const Saved& saved, Gradients<S>& gradients, Matrix<S> dh) const {
      static_assert(detail::Differentiable<HeadOn>, "m2lm: the head of this decoder has no Saved and no backward, so the decoder cannot be trained");
      const Arena::Scope scope(ctx.arena);
      const Matrix<S> dx = ctx.arena.template matrix<S>(dh.extent(0), dh.extent(1));
      head.backward(ctx, dlogits, saved.head, gradients, embed_tokens.weight, dx);
      norm.backward(ctx, dx, saved.norm, gradients, dh);
    }

   private:
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
