// MultiheadAttention: queries from one set of rows, keys and values from another, as torch.nn.MultiheadAttention.
// Floor: layers. May include: core, ops.
#pragma once

#include <m2lm/layers/kv_cache.hpp>
#include <m2lm/layers/linear.hpp>
#include <m2lm/ops/gather.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

namespace m2lm::inline M2LM_ABI {

/// The arguments of torch.nn.MultiheadAttention that are supported.
struct MultiheadConfig {
  std::int64_t width = 0;   ///< of queries, keys, values and outputs; a multiple of heads
  std::int64_t heads = 1;   ///< of width / heads values each
  bool bias_kv = false;     ///< add_bias_kv: a learned key and value beside the rows
  bool zero_logit = false;  ///< add_zero_attn: one more logit of 0, whose value is 0
};

/// Keys as in torch.nn.MultiheadAttention: in_proj_weight [3·width, width] (queries, keys, values below each other), in_proj_bias,
/// bias_k and bias_v [1, 1, width], out_proj. The keys and values of a memory that does not change are computed once.
template <class B>
class MultiheadAttention {
  using S = ScalarOf<B>;
  MultiheadConfig config_;
  DType format_ = DType::native;  // of keys and values
  Linear<B> query_, key_, value_;
  Tensor<S> extra_key_, extra_value_;

 public:
  Parameter in_proj_weight, in_proj_bias, bias_k, bias_v;
  Linear<B> out_proj;

  MultiheadAttention() = default;
  /// Parameters without values.
  explicit MultiheadAttention(const MultiheadConfig& c)
      : config_(c),
        query_(c.width, c.width, true),
        key_(c.width, c.width, true),
        value_(c.width, c.width, true),
        in_proj_weight(Shape{3 * c.width, c.width}),
        in_proj_bias(Shape{3 * c.width}),
        out_proj(c.width, c.width, true) {
    require<OptionError>(c.heads > 0 && c.width % c.heads == 0, "m2lm::MultiheadAttention: a width of ", c.width, " for ", c.heads, " heads");
    if (c.bias_kv) bias_k = bias_v = Parameter(Shape{1, 1, c.width});
  }

  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("in_proj_weight", self.in_proj_weight);
    visit("in_proj_bias", self.in_proj_bias);
    if (self.config_.bias_kv) {
      visit("bias_k", self.bias_k);
      visit("bias_v", self.bias_v);
    }
    visit("out_proj", self.out_proj);
  }

  void prepare(Context<B>& ctx, DType format) {
    format_ = plain_format(format, plain_format_on<B>);
    std::int64_t row = 0;
    for (Linear<B>* part : {&query_, &key_, &value_}) {
      part->weight.value = in_proj_weight.value.rows(row, row + config_.width);
      part->bias.value = in_proj_bias.value.rows(row, row + config_.width);
      part->prepare(ctx, format);
      row += config_.width;
    }
    out_proj.prepare(ctx, format);
    if (!config_.bias_kv) return;
    extra_key_ = ops::upload_tensor(ctx, bias_k.value);
    extra_value_ = ops::upload_tensor(ctx, bias_v.value);
  }

  /// Keys and values of `x` [rows, width], and the learned ones if there are any.
  KvCache<B> memory(Context<B>& ctx, Matrix<const S> x) const {
    KvCache<B> out(ctx, format_, 1, config_.heads, config_.width / config_.heads, x.extent(0) + (config_.bias_kv ? 1 : 0));
    append(ctx, x, out);
    finish(ctx, out);
    return out;
  }

  /// The same of a table [rows, width], in pieces, so that a vocabulary needs little scratch memory.
  KvCache<B> memory(Context<B>& ctx, const AnyTensor& table) const {
    constexpr std::int64_t piece = 256;
    const std::int64_t rows = table.shape()[0];
    KvCache<B> out(ctx, format_, 1, config_.heads, config_.width / config_.heads, rows + (config_.bias_kv ? 1 : 0));
    std::vector<std::int32_t> ids(static_cast<std::size_t>(piece));
    for (std::int64_t begin = 0; begin < rows; begin += piece) {
      const Arena::Scope scope(ctx.arena);
      const std::int64_t count = std::min(piece, rows - begin);
      std::iota(ids.begin(), ids.end(), static_cast<std::int32_t>(begin));
      const Matrix<S> x = ctx.arena.template matrix<S>(count, config_.width);
      ops::gather_rows(ctx, table, std::span<const std::int32_t>(ids).first(static_cast<std::size_t>(count)), x);
      append(ctx, x, out);
    }
    finish(ctx, out);
    return out;
  }

  /// y = out_proj(softmax(q·kᵀ/√head_dim)·v), every query over the whole memory. requires x, y [rows, width]; y may alias x.
  void forward(Context<B>& ctx, Matrix<const S> x, const KvCache<B>& memory, Matrix<S> y) const {
    const Arena::Scope scope(ctx.arena);
    const Matrix<S> q = ctx.arena.template matrix<S>(x.extent(0), config_.width), mixed = ctx.arena.template matrix<S>(x.extent(0), config_.width);
    query_.forward(ctx, x, q);
    ops::attention(ctx, Matrix<const S>(q), memory.layer(0), memory.length(), 0, AttentionMask{},
                   1.0 / std::sqrt(static_cast<double>(config_.width / config_.heads)), mixed, Sinks{.zero_logit = config_.zero_logit});
    out_proj.forward(ctx, mixed, y);
  }

 private:
  void append(Context<B>& ctx, Matrix<const S> x, KvCache<B>& to) const {
    const Arena::Scope scope(ctx.arena);
    const Matrix<S> k = ctx.arena.template matrix<S>(x.extent(0), config_.width), v = ctx.arena.template matrix<S>(x.extent(0), config_.width);
    key_.forward(ctx, x, k);
    value_.forward(ctx, x, v);
    ops::append_key_values(ctx, Matrix<const S>(k), Matrix<const S>(v), to.length(), to.layer(0));
    to.advance(x.extent(0));
  }
  void finish(Context<B>& ctx, KvCache<B>& to) const {
    if (!config_.bias_kv) return;
    ops::append_key_values(ctx, Matrix<const S>(extra_key_.data(), {1, config_.width}), Matrix<const S>(extra_value_.data(), {1, config_.width}), to.length(),
                           to.layer(0));
    to.advance(1);
  }
};

}  // namespace m2lm
