// The attention layers: causal with a KV cache (LLaMA family), and full (vision encoders).
// Floor: layers. May include: core, ops.
#pragma once

#include <m2lm/layers/kv_cache.hpp>
#include <m2lm/layers/linear.hpp>
#include <m2lm/layers/rope.hpp>

#include <cmath>
#include <cstring>
#include <span>

namespace m2lm {

/// Sizes of an attention layer. heads is a multiple of kv_heads.
struct AttentionConfig {
  std::int64_t hidden_size = 0, heads = 0, kv_heads = 0, head_dim = 0;
  std::int64_t window = 0;  ///< sliding window, 0 = none
  bool qkv_bias = false, output_bias = false;
};

/// Grouped-query attention with rotary positions and a KV cache. Keys as in LlamaForCausalLM: q_proj, k_proj, v_proj, o_proj.
template <class B>
class CausalAttention {
  using S = ScalarOf<B>;
  AttentionConfig config_;
  Linear<B> qkv_;  // q, k and v below each other: one product

 public:
  Linear<B> q_proj, k_proj, v_proj, o_proj;

  CausalAttention() = default;
  explicit CausalAttention(const AttentionConfig& c)
      : config_(c),
        q_proj(c.hidden_size, c.heads * c.head_dim, c.qkv_bias),
        k_proj(c.hidden_size, c.kv_heads * c.head_dim, c.qkv_bias),
        v_proj(c.hidden_size, c.kv_heads * c.head_dim, c.qkv_bias),
        o_proj(c.heads * c.head_dim, c.hidden_size, c.output_bias) {}

  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("q_proj", self.q_proj);
    visit("k_proj", self.k_proj);
    visit("v_proj", self.v_proj);
    visit("o_proj", self.o_proj);
  }

  void prepare(Context<B>& ctx, DType format) {
    qkv_.fuse(ctx, format, {&q_proj, &k_proj, &v_proj});
    o_proj.prepare(ctx, format);
  }

  /// h += o_proj(attention(x)). requires x, h [rows, hidden]; cos, sin [rows, head_dim/2] for each row's position. Writes the
  /// keys and values of the rows to layer `layer` of each sequence's cache (it does not advance the cache).
  void forward(Context<B>& ctx, std::int64_t layer, Matrix<const S> x, std::span<const SequenceRows<B>> sequences, Matrix<const S> cos,
               Matrix<const S> sin, Matrix<S> h) const {
    const Arena::Scope scope(ctx.arena);
    const std::int64_t d = config_.head_dim, q_width = config_.heads * d, kv_width = config_.kv_heads * d;
    const Matrix<S> qkv = ctx.arena.template matrix<S>(x.extent(0), q_width + 2 * kv_width);
    const Matrix<S> mixed = ctx.arena.template matrix<S>(x.extent(0), q_width);
    qkv_.forward(ctx, x, qkv);
    const Matrix<S> q = qkv.columns(0, q_width), k = qkv.columns(q_width, q_width + kv_width), v = qkv.columns(q_width + kv_width, q_width + 2 * kv_width);
    ops::rope(ctx, qkv.columns(0, q_width + kv_width), d, cos, sin);
    const double scale = 1.0 / (M2LM_FAULT(32) ? static_cast<double>(d) : std::sqrt(static_cast<double>(d)));
    const std::int64_t window = config_.window + (M2LM_FAULT(29) && config_.window > 0 ? 1 : 0);
    for (const SequenceRows<B>& s : sequences) {
      const std::int64_t first = s.cache->length(), end = s.begin + s.count;
      const KeyValues& kv = s.cache->layer(layer);
      ops::append_key_values(ctx, Matrix<const S>(k.rows(s.begin, end)), Matrix<const S>(v.rows(s.begin, end)), first, kv);
      ops::attention(ctx, Matrix<const S>(q.rows(s.begin, end)), kv, first + s.count, first, AttentionMask{.causal = true, .window = window}, scale,
                     mixed.rows(s.begin, end));
    }
    o_proj.forward(ctx, mixed, h, Activation::none, h);
  }
};

/// Every token sees every token. Keys as in CLIP: q_proj, k_proj, v_proj, out_proj, all with biases.
template <class B>
class FullAttention {
  using S = ScalarOf<B>;
  AttentionConfig config_;
  Linear<B> qkv_;

 public:
  Linear<B> k_proj, v_proj, q_proj, out_proj;

  FullAttention() = default;
  explicit FullAttention(const AttentionConfig& c)
      : config_(c),
        k_proj(c.hidden_size, c.kv_heads * c.head_dim, c.qkv_bias),
        v_proj(c.hidden_size, c.kv_heads * c.head_dim, c.qkv_bias),
        q_proj(c.hidden_size, c.heads * c.head_dim, c.qkv_bias),
        out_proj(c.heads * c.head_dim, c.hidden_size, c.output_bias) {}

  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("k_proj", self.k_proj);
    visit("v_proj", self.v_proj);
    visit("q_proj", self.q_proj);
    visit("out_proj", self.out_proj);
  }

  void prepare(Context<B>& ctx, DType format) {
    qkv_.fuse(ctx, format, {&q_proj, &k_proj, &v_proj});
    out_proj.prepare(ctx, format);
  }

  /// h += out_proj(attention(x)). requires x, h [tokens, hidden]; keys and values are held in `format`.
  void forward(Context<B>& ctx, DType format, Matrix<const S> x, Matrix<S> h) const {
    const Arena::Scope scope(ctx.arena);
    const std::int64_t tokens = x.extent(0), d = config_.head_dim, q_width = config_.heads * d, kv_width = config_.kv_heads * d;
    const Matrix<S> qkv = ctx.arena.template matrix<S>(tokens, q_width + 2 * kv_width);
    const Matrix<S> mixed = ctx.arena.template matrix<S>(tokens, q_width);
    qkv_.forward(ctx, x, qkv);
    const KeyValuesPlan plan = ops::plan_key_values(ctx, format, config_.kv_heads, d, tokens);
    const auto bytes = static_cast<std::int64_t>(plan.bytes);
    const KeyValues kv{.format = format, .kv_heads = config_.kv_heads, .head_dim = d, .capacity = plan.capacity,
                       .keys = ctx.arena.template take<std::byte>(bytes), .values = ctx.arena.template take<std::byte>(bytes)};
    std::memset(kv.keys, 0, plan.bytes);
    std::memset(kv.values, 0, plan.bytes);
    ops::append_key_values(ctx, Matrix<const S>(qkv.columns(q_width, q_width + kv_width)), Matrix<const S>(qkv.columns(q_width + kv_width, q_width + 2 * kv_width)),
                           0, kv);
    ops::attention(ctx, Matrix<const S>(qkv.columns(0, q_width)), kv, tokens, 0, AttentionMask{}, 1.0 / std::sqrt(static_cast<double>(d)), mixed);
    out_proj.forward(ctx, mixed, h, Activation::none, h);
  }
};

}  // namespace m2lm
