// The attention layers: causal with a KV cache (LLaMA family), and full (vision encoders).
// Floor: layers. May include: core, ops.
#pragma once

#include <m2lm/layers/kv_cache.hpp>
#include <m2lm/layers/linear.hpp>
#include <m2lm/layers/rope.hpp>

#include <cmath>
#include <span>

namespace m2lm::inline M2LM_ABI {

/// Sizes of an attention layer. heads is a multiple of kv_heads.
struct AttentionConfig {
  std::int64_t hidden_size = 0;  ///< values per row, in and out
  std::int64_t heads = 0;        ///< of queries
  std::int64_t kv_heads = 0;     ///< of keys and values; heads / kv_heads queries share one
  std::int64_t head_dim = 0;     ///< values per head
  std::int64_t window = 0;       ///< sliding window, 0 = none
  bool qkv_bias = false;         ///< q_proj, k_proj and v_proj have a bias
  bool output_bias = false;      ///< o_proj has a bias
};

/// What the attention layers share: q, k and v as one product, the output projection, attention over whole sequences, gradients.
template <class B>
class SelfAttention {
 protected:
  using S = ScalarOf<B>;
  AttentionConfig config_;
  Linear<B> qkv_;  // q, k and v below each other: one product

  SelfAttention() = default;
  /// Parameters without values: q_proj, k_proj, v_proj and o_proj of the config's shapes.
  explicit SelfAttention(const AttentionConfig& c)
      : config_(c),
        q_proj(c.hidden_size, c.heads * c.head_dim, c.qkv_bias),
        k_proj(c.hidden_size, c.kv_heads * c.head_dim, c.qkv_bias),
        v_proj(c.hidden_size, c.kv_heads * c.head_dim, c.qkv_bias),
        o_proj(c.heads * c.head_dim, c.hidden_size, c.output_bias) {}

  /// heads · head_dim.
  std::int64_t q_width() const { return config_.heads * config_.head_dim; }
  /// kv_heads · head_dim.
  std::int64_t kv_width() const { return config_.kv_heads * config_.head_dim; }
  /// Columns of q, k and v beside each other.
  std::int64_t qkv_width() const { return q_width() + 2 * kv_width(); }
  /// Factor of the products q·k: 1 / √head_dim.
  double scale() const {
    const auto d = static_cast<double>(config_.head_dim);
    return 1.0 / (M2LM_FAULT(32) ? d : std::sqrt(d));
  }
  /// The columns of a matrix [rows, qkv_width()], of values or of gradients.
  template <class T>
  Matrix<T> q_of(Matrix<T> qkv) const {
    return qkv.columns(0, q_width());
  }
  /// The columns of the keys.
  template <class T>
  Matrix<T> k_of(Matrix<T> qkv) const {
    return qkv.columns(q_width(), q_width() + kv_width());
  }
  /// The columns of the values.
  template <class T>
  Matrix<T> v_of(Matrix<T> qkv) const {
    return qkv.columns(q_width() + kv_width(), qkv_width());
  }

  /// mixed = attention among the rows of qkv, one whole sequence. Keys and values are held in `format` while it runs.
  void attend(Context<B>& ctx, DType format, Matrix<const S> qkv, AttentionMask mask, Matrix<S> mixed) const {
    const Arena::Scope scope(ctx.arena);
    const std::int64_t tokens = qkv.extent(0);
    const KeyValuesPlan plan = ops::plan_key_values(ctx, format, config_.kv_heads, config_.head_dim, tokens);
    const auto bytes = static_cast<std::int64_t>(plan.bytes);
    const KeyValues kv{.format = format, .kv_heads = config_.kv_heads, .head_dim = config_.head_dim, .capacity = plan.capacity,
                       .keys = ctx.arena.template take<std::byte>(bytes), .values = ctx.arena.template take<std::byte>(bytes)};
    ops::append_key_values(ctx, k_of(qkv), v_of(qkv), 0, kv);
    ops::attention(ctx, q_of(qkv), kv, tokens, 0, mask, scale(), mixed);
  }
  /// dqkv from the gradient of `mixed`.
  void attend_backward(Context<B>& ctx, Matrix<const S> qkv, Matrix<const S> mixed, Matrix<const S> dmixed, AttentionMask mask, Matrix<S> dqkv) const {
    ops::attention_backward(ctx, q_of(qkv), k_of(qkv), v_of(qkv), mixed, dmixed, config_.head_dim, mask, scale(), q_of(dqkv), k_of(dqkv), v_of(dqkv));
  }
  /// From dqkv: the gradients of the three projections, and of their input unless dx is empty.
  void project_backward(Context<B>& ctx, Matrix<const S> x, Matrix<const S> dqkv, Gradients<S>& gradients, Matrix<S> dx) const {
    Linear<B>::parameter_gradients(ctx, x, dqkv, gradients, {&q_proj, &k_proj, &v_proj});
    if (dx.data()) qkv_.input_gradient(ctx, dqkv, dx);
  }

 public:
  Linear<B> q_proj, k_proj, v_proj, o_proj;

  void prepare(Context<B>& ctx, DType format) {
    qkv_.fuse(ctx, format, {&q_proj, &k_proj, &v_proj});
    o_proj.prepare(ctx, format);
  }
};

/// Grouped-query attention with rotary positions and a KV cache. Keys as in LlamaForCausalLM: q_proj, k_proj, v_proj, o_proj.
template <class B>
class CausalAttention : public SelfAttention<B> {
  using Base = SelfAttention<B>;
  using S = ScalarOf<B>;
  using Base::config_;

  AttentionMask mask() const { return {.causal = true, .window = config_.window + (M2LM_FAULT(29) && config_.window > 0 ? 1 : 0)}; }

 public:
  CausalAttention() = default;
  /// Parameters without values.
  explicit CausalAttention(const AttentionConfig& c) : Base(c) {}

  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("q_proj", self.q_proj);
    visit("k_proj", self.k_proj);
    visit("v_proj", self.v_proj);
    visit("o_proj", self.o_proj);
  }

  struct Saved {
    Matrix<const S> x;                           // the caller's
    Matrix<const AccumulatorOf<B>> cos, sin;     // the caller's
    std::span<const SequenceRows<B>> sequences;  // the caller's
    Matrix<const S> qkv;                         // q and k rotated
    Matrix<const S> mixed;                       // what o_proj reads
  };
  /// h += o_proj(attention(x)). requires x, h [rows, hidden]; cos, sin [rows, head_dim/2] for each row's position. Writes the
  /// keys and values of the rows to layer `layer` of each sequence's cache (it does not advance the cache). What is saved for a
  /// gradient is of whole sequences: they have no cache.
  void forward(Context<B>& ctx, std::int64_t layer, Matrix<const S> x, std::span<const SequenceRows<B>> sequences,
               Matrix<const AccumulatorOf<B>> cos, Matrix<const AccumulatorOf<B>> sin, Matrix<S> h, Saved* saved = nullptr) const {
    const Arena::Scope scope(ctx.arena);
    Arena& storage = ctx.storage(saved != nullptr);
    const Matrix<S> qkv = storage.template matrix<S>(x.extent(0), this->qkv_width());
    const Matrix<S> mixed = storage.template matrix<S>(x.extent(0), this->q_width());
    this->qkv_.forward(ctx, x, qkv);
    if constexpr (!ops::FusesRopeAppend<B>) ops::rope(ctx, qkv.columns(0, this->q_width() + this->kv_width()), config_.head_dim, cos, sin);
    for (const SequenceRows<B>& s : sequences) {
      require(s.cache == nullptr || saved == nullptr, "m2lm::CausalAttention: a sequence whose gradient is wanted is given whole, without a cache");
      const std::int64_t first = s.first(), end = s.begin + s.count;
      const Matrix<const S> rows = qkv.rows(s.begin, end);
      if constexpr (ops::FusesRopeAppend<B>)
        if (!s.cache) ops::rope(ctx, qkv.rows(s.begin, end).columns(0, this->q_width() + this->kv_width()), config_.head_dim, cos.rows(s.begin, end), sin.rows(s.begin, end));
      if (s.cache) {
        const KeyValues& kv = s.cache->layer(layer);
        if constexpr (ops::FusesRopeAppend<B>)
          ops::rope_append(ctx, qkv.rows(s.begin, end), config_.heads, cos.rows(s.begin, end), sin.rows(s.begin, end), first, kv);
        else
          ops::append_key_values(ctx, this->k_of(rows), this->v_of(rows), first, kv);
        ops::attention(ctx, this->q_of(rows), kv, first + s.count, first, mask(), this->scale(), mixed.rows(s.begin, end));
      } else if (s.count > 0) {
        this->attend(ctx, dtype_of<S>, rows, mask(), mixed.rows(s.begin, end));
      }
    }
    this->o_proj.forward(ctx, mixed, h, Activation::none, h);
    if (saved) *saved = {x, cos, sin, sequences, qkv, mixed};
  }
  /// From dh, the gradient of the h that forward left: adds those of trained parameters, and writes that of x to dx unless dx is
  /// empty. (dh is also the gradient of the h that forward found.) requires every row in a sequence.
  void backward(Context<B>& ctx, Matrix<const S> dh, const Saved& saved, Gradients<S>& gradients, Matrix<S> dx) const {
    const Arena::Scope scope(ctx.arena);
    const Matrix<S> dmixed = ctx.arena.template matrix<S>(dh.extent(0), this->q_width());
    const Matrix<S> dqkv = ctx.arena.template matrix<S>(dh.extent(0), this->qkv_width());
    this->o_proj.backward(ctx, dh, {saved.mixed}, gradients, dmixed);
    for (const SequenceRows<B>& s : saved.sequences) {
      const std::int64_t end = s.begin + s.count;
      if (s.count > 0)
        this->attend_backward(ctx, saved.qkv.rows(s.begin, end), saved.mixed.rows(s.begin, end), dmixed.rows(s.begin, end), mask(), dqkv.rows(s.begin, end));
    }
    ops::rope_backward(ctx, dqkv.columns(0, this->q_width() + this->kv_width()), config_.head_dim, saved.cos, saved.sin);
    this->project_backward(ctx, saved.x, dqkv, gradients, dx);
  }
};

/// Every token sees every token. Keys as in CLIP: q_proj, k_proj, v_proj, out_proj, all with biases.
template <class B>
class FullAttention : public SelfAttention<B> {
  using Base = SelfAttention<B>;
  using S = ScalarOf<B>;

 public:
  FullAttention() = default;
  /// Parameters without values.
  explicit FullAttention(const AttentionConfig& c) : Base(c) {}

  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("k_proj", self.k_proj);
    visit("v_proj", self.v_proj);
    visit("q_proj", self.q_proj);
    visit("out_proj", self.o_proj);
  }

  struct Saved {
    Matrix<const S> x;           // the caller's
    Matrix<const S> qkv, mixed;  // mixed: what o_proj reads
  };
  /// h += out_proj(attention(x)). requires x, h [tokens, hidden]; keys and values are held in `format`.
  void forward(Context<B>& ctx, DType format, Matrix<const S> x, Matrix<S> h, Saved* saved = nullptr) const {
    const Arena::Scope scope(ctx.arena);
    Arena& storage = ctx.storage(saved != nullptr);
    const Matrix<S> qkv = storage.template matrix<S>(x.extent(0), this->qkv_width());
    const Matrix<S> mixed = storage.template matrix<S>(x.extent(0), this->q_width());
    this->qkv_.forward(ctx, x, qkv);
    this->attend(ctx, format, qkv, AttentionMask{}, mixed);
    this->o_proj.forward(ctx, mixed, h, Activation::none, h);
    if (saved) *saved = {x, qkv, mixed};
  }
  /// As CausalAttention::backward.
  void backward(Context<B>& ctx, Matrix<const S> dh, const Saved& saved, Gradients<S>& gradients, Matrix<S> dx) const {
    const Arena::Scope scope(ctx.arena);
    const Matrix<S> dmixed = ctx.arena.template matrix<S>(dh.extent(0), this->q_width());
    const Matrix<S> dqkv = ctx.arena.template matrix<S>(dh.extent(0), this->qkv_width());
    this->o_proj.backward(ctx, dh, {saved.mixed}, gradients, dmixed);
    this->attend_backward(ctx, saved.qkv, saved.mixed, dmixed, AttentionMask{}, dqkv);
    this->project_backward(ctx, saved.x, dqkv, gradients, dx);
  }
};

}  // namespace m2lm
