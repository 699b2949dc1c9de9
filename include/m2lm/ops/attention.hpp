// Keys and values in a backend's own layout, attention over them, and the gradient of attention.
// Floor: ops. May include: core, ops.
#pragma once

#include <m2lm/ops/op.hpp>
#include <m2lm/ops/rope.hpp>

namespace m2lm::inline M2LM_ABI {

/// The keys and values of one layer for one sequence, in the layout of the backend that made it. Non-owning.
struct KeyValues {
  DType format = DType::native;
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t capacity = 0;  ///< keys that fit
  std::byte* keys = nullptr;
  std::byte* values = nullptr;
  /// In a device's memory: how many positions are stored, which is where the next ones go; null: `first` of a call says it. Kernels
  /// read it there, so that a recorded step can be repeated.
  const OnDevice<std::int32_t>* length = nullptr;
};

/// Bytes of `keys` and of `values` (the two are equal), as a backend lays them out.
struct KeyValuesPlan {
  std::int64_t capacity = 0;  ///< rounded up as the backend likes it
  std::size_t bytes = 0;
};

/// Which keys a query at position p sees: none = all, causal = j <= p, window w > 0 = p - w < j <= p (causal too).
struct AttentionMask {
  bool causal = false;
  std::int64_t window = 0;
  friend constexpr bool operator==(const AttentionMask&, const AttentionMask&) = default;
};

/// Extra terms in the softmax of every query and head. (A learned key and value, add_bias_kv of torch.nn.MultiheadAttention, needs
/// none: it is one more row of the keys and values.)
struct Sinks {
  bool zero_logit = false;  ///< one more logit of 0, whose value is 0 (add_zero_attn; the softmax-off-by-one of MMFS)
  friend constexpr bool operator==(const Sinks&, const Sinks&) = default;
};

namespace ops {

struct PlanKeyValues;
struct AppendKeyValues;
struct CopyKeyValues;
struct AddToLength;
struct SetLength;
struct RopeAppend;
struct Attention;
struct AttentionBackward;

/// Sizes of the buffers for `capacity` keys. What they hold at first does not matter to a host, where positions are stored from 0 on without a gap.
template <class B>
KeyValuesPlan plan_key_values(Context<B>& ctx, DType format, std::int64_t kv_heads, std::int64_t head_dim, std::int64_t capacity) {
  require(kv_heads > 0 && head_dim > 0 && capacity >= 0, "m2lm::ops::plan_key_values: ", kv_heads, " heads of ", head_dim, " for ", capacity, " keys");
  return Impl<PlanKeyValues, B>::run(ctx, format, kv_heads, head_dim, capacity);
}

/// Stores k and v of tokens at positions [first, first + tokens). requires k, v [tokens, kv_heads·head_dim].
template <class B>
void append_key_values(Context<B>& ctx, Matrix<const ScalarOf<B>> k, Matrix<const ScalarOf<B>> v, std::int64_t first, const KeyValues& kv) {
  require(k.shape() == v.shape() && k.extent(1) == kv.kv_heads * kv.head_dim, "m2lm::ops::append_key_values: k is ", k.shape(), ", v is ",
          v.shape(), ", expected ", kv.kv_heads, " heads of ", kv.head_dim);
  require<CapacityError>(first >= 0 && first + k.extent(0) <= kv.capacity, "m2lm::ops::append_key_values: positions ", first, " to ",
                         first + k.extent(0), " do not fit in ", kv.capacity);
  if (k.elements() != 0) Impl<AppendKeyValues, B>::run(ctx, k, v, first, kv);
}

/// A backend that rotates queries and keys and stores keys and values in one go.
template <class B>
concept FusesRopeAppend = !HostBackend<B>;

/// rope of the heads·head_dim columns of q and the kv_heads·head_dim columns of k behind them, then append_key_values of k and of v, the
/// columns that follow. requires qkv [tokens, (heads + 2·kv_heads)·head_dim], cos and sin [tokens, head_dim/2].
template <FusesRopeAppend B>
void rope_append(Context<B>& ctx, Matrix<ScalarOf<B>> qkv, std::int64_t heads, Matrix<const AccumulatorOf<B>> cos, Matrix<const AccumulatorOf<B>> sin,
                 std::int64_t first, const KeyValues& kv) {
  require(qkv.extent(1) == (heads + 2 * kv.kv_heads) * kv.head_dim && kv.head_dim % 2 == 0 && cos.extent(0) == qkv.extent(0) && sin.shape() == cos.shape() &&
              cos.extent(1) * 2 == kv.head_dim,
          "m2lm::ops::rope_append: qkv is ", qkv.shape(), ", cos ", cos.shape(), " for ", heads, " and ", kv.kv_heads, " heads of ", kv.head_dim);
  require<CapacityError>(first >= 0 && first + qkv.extent(0) <= kv.capacity, "m2lm::ops::rope_append: positions ", first, " to ", first + qkv.extent(0),
                         " do not fit in ", kv.capacity);
  if (qkv.elements() != 0) Impl<RopeAppend, B>::run(ctx, qkv, heads, cos, sin, first, kv);
}

/// Copies the keys and values of positions [0, count). requires equal heads, head_dim and format, and room for them.
template <class B>
void copy_key_values(Context<B>& ctx, const KeyValues& from, std::int64_t count, const KeyValues& to) {
  require(from.kv_heads == to.kv_heads && from.head_dim == to.head_dim && from.format == to.format, "m2lm::ops::copy_key_values: ", from.kv_heads, " heads of ",
          from.head_dim, " into ", to.kv_heads, " of ", to.head_dim);
  require<CapacityError>(0 <= count && count <= from.capacity && count <= to.capacity, "m2lm::ops::copy_key_values: ", count, " positions of ", from.capacity,
                         " into ", to.capacity);
  if (count != 0) Impl<CopyKeyValues, B>::run(ctx, from, count, to);
}

/// y = softmax(scale · q·kᵀ + mask)·v per head, softmax in f32 or better. Query t stands at position first + t; keys
/// [0, keys) are stored. requires q, y [tokens, heads·head_dim], heads a multiple of kv_heads (head h reads kv head
/// h / (heads / kv_heads)); every query sees a key, or there is a sink; y does not alias q. Never writes the whole score matrix.
/// Keys are visited in blocks of fixed size from 0 on, so the bits do not depend on how queries are grouped into calls.
template <class B>
void attention(Context<B>& ctx, Matrix<const ScalarOf<B>> q, const KeyValues& kv, std::int64_t keys, std::int64_t first, AttentionMask mask,
               double scale, Matrix<ScalarOf<B>> y, Sinks sinks = {}) {
  require(q.shape() == y.shape() && q.extent(1) % (kv.kv_heads * kv.head_dim) == 0, "m2lm::ops::attention: q is ", q.shape(), ", y is ",
          y.shape(), ", keys have ", kv.kv_heads, " heads of ", kv.head_dim);
  const bool ordered = mask.causal || mask.window > 0;
  require(keys <= kv.capacity && (keys > 0 || q.extent(0) == 0 || sinks.zero_logit) && first >= 0 && (!ordered || first + q.extent(0) <= keys), "m2lm::ops::attention: ",
          q.extent(0), " queries from position ", first, " over ", keys, " keys of ", kv.capacity);
  if (q.elements() != 0) Impl<Attention, B>::run(ctx, q, kv, keys, first, mask, scale, y, sinks);
}

/// dq, dk, dv = the gradients of q, k and v where y = attention of them has the gradient dy. One whole sequence: query t and key t
/// stand at position t. The softmax is computed again; never more of the score matrix than a block per head is in memory.
/// requires q, y, dy, dq [queries, heads·head_dim], k, v, dk, dv [keys, kv_heads·head_dim]; head h reads kv head h / (heads / kv_heads),
/// so dk and dv are sums over its group; keys > 0; queries <= keys under a causal mask or a window; dq, dk, dv are overwritten and
/// alias nothing; rows may be strided. ensures sums in an order that does not depend on threads.
template <class B>
void attention_backward(Context<B>& ctx, Matrix<const ScalarOf<B>> q, Matrix<const ScalarOf<B>> k, Matrix<const ScalarOf<B>> v,
                        Matrix<const ScalarOf<B>> y, Matrix<const ScalarOf<B>> dy, std::int64_t head_dim, AttentionMask mask, double scale,
                        Matrix<ScalarOf<B>> dq, Matrix<ScalarOf<B>> dk, Matrix<ScalarOf<B>> dv) {
  require(head_dim > 0 && k.extent(1) > 0 && k.extent(1) % head_dim == 0 && q.extent(1) % k.extent(1) == 0 && k.shape() == v.shape(),
          "m2lm::ops::attention_backward: q is ", q.shape(), ", k is ", k.shape(), ", v is ", v.shape(), ", head_dim ", head_dim);
  require(y.shape() == q.shape() && dy.shape() == q.shape() && dq.shape() == q.shape() && dk.shape() == k.shape() && dv.shape() == v.shape(),
          "m2lm::ops::attention_backward: q is ", q.shape(), ", y ", y.shape(), ", dy ", dy.shape(), ", dq ", dq.shape(),
          ", k ", k.shape(), ", dk ", dk.shape(), ", dv ", dv.shape());
  const bool ordered = mask.causal || mask.window > 0;
  require(k.extent(0) > 0 && (!ordered || q.extent(0) <= k.extent(0)), "m2lm::ops::attention_backward: ", q.extent(0), " queries over ", k.extent(0), " keys");
  Impl<AttentionBackward, B>::run(ctx, q, k, v, y, dy, head_dim, mask, scale, dq, dk, dv);
}

}  // namespace ops
}  // namespace m2lm
