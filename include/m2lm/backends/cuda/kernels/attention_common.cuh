// What the attention kernels share: their arguments, which keys a block looks at, how tiles come into shared memory, and the kernel that
// combines the partial sums of split keys.
// Floor: backends. May include: core, ops.
#pragma once

#include <m2lm/backends/cuda/device.cuh>

namespace m2lm::inline M2LM_ABI::cuda {

/// More than there are; added to a position it still fits in 32 bits.
inline constexpr int all_keys = 1 << 29;

/// Of every attention kernel. A row is a query of one head; the heads of a group read the same keys. Per key/value head the rows are
/// counted through the group first: row r is query r / group of head r % group of the group. So a block's rows are neighbours in
/// time and see nearly the same keys. Scores are kept in units of log2: exp(x) = 2^(x·log2 e).
template <class E>
struct AttentionArguments {
  const E* q = nullptr;
  const E* keys = nullptr;  ///< [kv_heads][capacity][head_dim]
  const E* values = nullptr;
  E* y = nullptr;
  float* partial = nullptr;  ///< [rows of all heads][splits][head_dim] sums, then as many {maximum, sum}; null where keys are not split
  const std::int32_t* length = nullptr;
  std::int64_t q_stride = 0, y_stride = 0;
  std::int64_t head_stride = 0;  ///< capacity·head_dim
  int first = 0, most_keys = 0;
  int rows = 0, group = 1, kv_heads = 1, head_dim = 1;
  int behind = 0, ahead = 0;  ///< keys that a query sees before and after its own position; all_keys: all that there are
  int splits = 1, keys_per_split = 0;
  int vectors = 0;  ///< keys and values may be read in pieces of 16 bytes
  int zero_logit = 0;
  float scale_log2 = 1;  ///< scale·log2 e
};

/// Keys [begin, end).
struct KeySpan {
  int begin, end;
};

/// The keys that a query at `position` sees.
template <class E>
M2LM_DEVICE KeySpan keys_seen_from(const AttentionArguments<E>& a, int position) {
  const int begin = position - a.behind, end = position + a.ahead + 1;
  return {begin > 0 ? begin : 0, end < a.most_keys ? end : a.most_keys};
}

/// The keys that a row sees, when row 0 stands at `first`.
template <class E>
M2LM_DEVICE KeySpan visible_keys(const AttentionArguments<E>& a, int first, int row) {
  return keys_seen_from(a, first + row / a.group);
}

template <class E>
M2LM_DEVICE int first_position(const AttentionArguments<E>& a) {
  return a.length != nullptr ? *a.length : a.first;
}

/// What a block computes: rows [row, row_end) of a key/value head over `span`, the keys that some row of it sees and its split holds.
/// Tiles of keys begin at multiples of the tile, so that a split is made of whole tiles.
struct BlockWork {
  int row, row_end, kv_head, split;
  KeySpan span;
  int tile_begin;  ///< of the first tile: at or before span.begin
};

template <class E>
M2LM_DEVICE BlockWork block_work(const AttentionArguments<E>& a, int first, int rows_per_block, int key_tile) {
  BlockWork work;
  // Under a causal mask the last rows see the most keys: their blocks begin first.
  work.row = static_cast<int>(gridDim.x - 1 - blockIdx.x) * rows_per_block;
  work.row_end = work.row + rows_per_block < a.rows ? work.row + rows_per_block : a.rows;
  work.kv_head = static_cast<int>(blockIdx.y);
  work.split = static_cast<int>(blockIdx.z);
  const int begin = visible_keys(a, first, work.row).begin, end = visible_keys(a, first, work.row_end - 1).end;
  const int origin = begin / key_tile * key_tile + work.split * a.keys_per_split;
  work.span.begin = begin > origin ? begin : origin;
  work.span.end = work.split + 1 < a.splits && origin + a.keys_per_split < end ? origin + a.keys_per_split : end;
  work.tile_begin = origin;
  return work;
}

/// Element offset of a row of q or y.
template <class E>
M2LM_DEVICE std::int64_t row_offset(const AttentionArguments<E>& a, std::int64_t stride, int kv_head, int row) {
  return row / a.group * stride + static_cast<std::int64_t>(kv_head * a.group + row % a.group) * a.head_dim;
}

/// Where the sums of a row and split are, and behind all sums its {maximum, sum of exponentials}.
template <class E>
M2LM_DEVICE std::int64_t partial_index(const AttentionArguments<E>& a, int kv_head, int row, int split) {
  return (static_cast<std::int64_t>(kv_head) * a.rows + row) * a.splits + split;
}
template <class E>
M2LM_DEVICE float* partial_statistics(const AttentionArguments<E>& a, std::int64_t index) {
  return a.partial + static_cast<std::int64_t>(a.kv_heads) * a.rows * a.splits * a.head_dim + 2 * index;
}

/// A block whose split holds no key that its rows see says so: a maximum of -inf, whose sums nobody reads.
template <class E>
M2LM_DEVICE void write_empty_partial(const AttentionArguments<E>& a, const BlockWork& work) {
  for (int row = work.row + static_cast<int>(threadIdx.x); row < work.row_end; row += static_cast<int>(blockDim.x)) {
    float* statistics = partial_statistics(a, partial_index(a, work.kv_head, row, work.split));
    statistics[0] = -INFINITY;
    statistics[1] = 0;
  }
}

/// What scores are taken relative to: where all keys were hidden so far the maximum is -inf, and -inf - (-inf) is NaN.
M2LM_DEVICE float finite_maximum(float maximum) { return maximum == -INFINITY ? 0.0F : maximum; }

/// Begins to copy keys [tile_begin, tile_begin + count) of a head, `width` elements each (a multiple of a piece of 16 bytes), to shared
/// memory; what lies outside the span, or behind head_dim, becomes zero: it may be anything in the cache, and 0 · NaN is NaN.
/// The copies are there after copy_async_wait and a barrier. Threads: of the block.
template <int Threads, class E>
M2LM_DEVICE void stage_keys(E* tile, int stride, const E* rows, int tile_begin, int count, KeySpan span, int width, int head_dim, int vectors) {
  constexpr int piece = 16 / static_cast<int>(sizeof(E));
  const int pieces = width / piece;
  int key = static_cast<int>(threadIdx.x) / pieces, c = static_cast<int>(threadIdx.x) % pieces * piece;
  const int key_step = Threads / pieces, column_step = Threads % pieces * piece;
  int offset = (tile_begin + key) * head_dim + c;
  E* to = tile + key * stride + c;
  while (key < count) {
    const bool seen = tile_begin + key >= span.begin && tile_begin + key < span.end;
    if (vectors != 0) {
      const bool valid = seen && c < head_dim;
      copy_async16(to, valid ? rows + offset : rows, valid);
    } else {
      for (int i = 0; i < piece; ++i) to[i] = seen && c + i < head_dim ? rows[offset + i] : E{};
    }
    const int wrap = c + column_step >= width ? 1 : 0;
    key += key_step + wrap;
    c += column_step - wrap * width;
    to += (key_step + wrap) * stride + column_step - wrap * width;
    offset += (key_step + wrap) * head_dim + column_step - wrap * width;
  }
}

/// y = Σ over splits of their sums, each brought to the same maximum, over the sum of all exponentials. A block per row.
template <class E>
M2LM_KERNEL void attention_combine(AttentionArguments<E> a) {
  const int row = static_cast<int>(blockIdx.x), kv_head = static_cast<int>(blockIdx.y);
  const std::int64_t index = partial_index(a, kv_head, row, 0);
  const float* const statistics = partial_statistics(a, index);
  float maximum = a.zero_logit != 0 ? 0.0F : -INFINITY;
  for (int s = 0; s < a.splits; ++s) maximum = fmaxf(maximum, statistics[2 * s]);
  maximum = finite_maximum(maximum);
  float sum = a.zero_logit != 0 ? exp2_approx(-maximum) : 0.0F;
  for (int s = 0; s < a.splits; ++s) sum += statistics[2 * s + 1] * exp2_approx(statistics[2 * s] - maximum);
  E* const y = a.y + row_offset(a, a.y_stride, kv_head, row);
  for (int c = static_cast<int>(threadIdx.x); c < a.head_dim; c += static_cast<int>(blockDim.x)) {
    float out = 0;
    for (int s = 0; s < a.splits; ++s)
      if (statistics[2 * s] != -INFINITY) out += a.partial[(index + s) * a.head_dim + c] * exp2_approx(statistics[2 * s] - maximum);
    y[c] = store<E>(out / sum);
  }
}

}  // namespace m2lm::cuda
