// Attention over packed keys and values, on the tiles of kernels.inc.hpp. Included once per level, inside its namespace and target
// region, after kernels.inc.hpp: no includes, no static locals here.

// Rows that share one pass over the keys: enough to use a widened block of narrow keys several times.
inline constexpr std::int64_t query_rows = 48;

template <class Tile>
std::size_t attention_scratch(std::int64_t head_dim) {
  const std::int64_t dk = round_up(head_dim, Tile::k_step), dv = round_up(head_dim, panel_width);
  const std::int64_t wide = Tile::widens ? panel_width * (dk > key_block ? dk : key_block) : 0;
  const std::int64_t bytes = query_rows * (round_up(dk, 32) + key_block) * static_cast<std::int64_t>(sizeof(typename Tile::X)) +
                             (query_rows * (key_block + dv + 2) + round_up(dk, 16) + wide) * static_cast<std::int64_t>(sizeof(float));
  return static_cast<std::size_t>(round_up(bytes, 64));
}

// One online-softmax step of one row over a block of keys. `s` holds the scores; keys outside [begin, end) are masked. Writes
// the probabilities over all `keys` of the block (0 where masked) to p, rescales the output row.
inline void softmax_step(float* s, std::int64_t begin, std::int64_t end, std::int64_t keys, float& largest, float& sum, float* output, std::int64_t dv) {
  if (begin >= end) {
    for (std::int64_t j = 0; j < keys; j += width) store(s + j, set(0.0F));
    return;
  }
  constexpr float hidden = -__builtin_inff();
  for (std::int64_t j = 0; j < begin; ++j) s[j] = hidden;
  for (std::int64_t j = end; j < keys; ++j) s[j] = hidden;
  Vec m = load(s);
  for (std::int64_t j = width; j < keys; j += width) m = max(m, load(s + j));
  const float block_largest = reduce_max(m);
  const float now_largest = block_largest > largest ? block_largest : largest;
  if (now_largest > largest && sum > 0.0F) {
    float factor[width];
    store(factor, exp(set(largest - now_largest)));
    sum *= factor[0];
    if (!M2LM_FAULT(17))
      for (std::int64_t j = 0; j < dv; j += width) store(output + j, load(output + j) * set(factor[0]));
  }
  largest = now_largest;
  Vec total = set(0.0F);
  for (std::int64_t j = 0; j < keys; j += width) {
    const Vec p = exp(load(s + j) - set(largest));
    store(s + j, p);
    total = total + p;
  }
  sum += reduce_add(total);
}

// Work is split by kv head and by tiles of rows; a row is a (token, head of the group) pair, so the heads of a GQA group share
// one pass over the keys.
template <class Tile>
void attention(const AttentionJob& job, int part, int parts, std::byte* scratch) {
  using X = typename Tile::X;
  using W = typename Tile::W;
  const std::int64_t d = job.head_dim, dk = round_up(d, Tile::k_step), dv = round_up(d, panel_width), ldq = round_up(dk, 32);
  X* q = reinterpret_cast<X*>(scratch);
  X* p = q + query_rows * ldq;  // the probabilities, as the tile reads them: in place of the scores if that is f32
  float* scores = reinterpret_cast<float*>(Tile::bf16_activations ? p + query_rows * key_block : p);
  float* output = scores + query_rows * key_block;
  float* largest = output + query_rows * dv;
  float* sum = largest + query_rows;
  float* row_buffer = sum + query_rows;  // one row of scaled q
  float* wide = row_buffer + round_up(dk, 16);
  const std::int64_t group = job.heads / job.kv_heads, rows = job.tokens * group, tiles = (rows + query_rows - 1) / query_rows;
  const bool causal = job.mask.causal || job.mask.window > 0;

  for (std::int64_t task = part; task < job.kv_heads * tiles; task += parts) {  // in turns: causal tiles grow
    const std::int64_t kv_head = task / tiles, row0 = task % tiles * query_rows;
    const std::int64_t count = rows - row0 < query_rows ? rows - row0 : query_rows;
    const W* keys = reinterpret_cast<const W*>(job.keys_data) + kv_head * job.capacity * dk;
    const W* values = reinterpret_cast<const W*>(job.values_data) + kv_head * job.capacity * dv;
    for (std::int64_t r = 0; r < count; ++r) {
      const std::int64_t head = M2LM_FAULT(18) ? ((row0 + r) % group) * job.kv_heads + kv_head : kv_head * group + (row0 + r) % group;
      const float* source = job.q + (row0 + r) / group * job.ldq + head * d;
      for (std::int64_t c = 0; c < d; ++c) row_buffer[c] = source[c] * job.scale;
      for (std::int64_t c = d; c < dk; ++c) row_buffer[c] = 0.0F;
      Tile::convert(row_buffer, dk, q + r * ldq);
      largest[r] = job.sinks.zero_logit ? 0.0F : -__builtin_inff();  // the sink is as a key that has been seen already
      sum[r] = job.sinks.zero_logit ? 1.0F : 0.0F;
      for (std::int64_t c = 0; c < dv; ++c) output[r * dv + c] = 0.0F;
    }
    const std::int64_t first_position = job.first + row0 / group, last_position = job.first + (row0 + count - 1) / group;
    const std::int64_t end_key = causal ? (last_position + 1 < job.keys ? last_position + 1 : job.keys) : job.keys;
    const std::int64_t begin_key = job.mask.window > 0 && first_position - job.mask.window + 1 > 0 ? first_position - job.mask.window + 1 : 0;
    for (std::int64_t block = begin_key / key_block * key_block; block < end_key; block += key_block) {
      const std::int64_t here = end_key - block < key_block ? round_up(end_key - block, panel_width) : key_block;
      for (std::int64_t j = 0; j < here; j += panel_width)
        run_rows_widened<Tile>(count, q, ldq, keys + (block + j) * dk, dk, scores + j, key_block, false, wide);
      for (std::int64_t r = 0; r < count; ++r) {
        const std::int64_t position = job.first + (row0 + r) / group + (M2LM_FAULT(19) ? 1 : 0);
        const std::int64_t low = job.mask.window > 0 ? position - job.mask.window + 1 - block : 0;
        const std::int64_t high = (causal && position + 1 < job.keys ? position + 1 : job.keys) - block;
        softmax_step(scores + r * key_block, low > 0 ? low : 0, high < here ? high : here, here, largest[r], sum[r], output + r * dv, dv);
        if constexpr (Tile::bf16_activations) Tile::convert(scores + r * key_block, here, p + r * key_block);
      }
      for (std::int64_t c = 0; c < dv; c += panel_width)
        run_rows_widened<Tile>(count, p, key_block, values + c * job.capacity + block * panel_width, here, output + c, dv, true, wide);
    }
    for (std::int64_t r = 0; r < count; ++r) {
      const std::int64_t head = kv_head * group + (row0 + r) % group;
      float* y = job.y + (row0 + r) / group * job.ldy + head * d;
      const float inverse = 1.0F / sum[r];
      for (std::int64_t c = 0; c < d; ++c) y[c] = output[r * dv + c] * inverse;
    }
  }
}
