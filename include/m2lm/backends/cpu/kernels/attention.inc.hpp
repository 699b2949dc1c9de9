// Attention over packed keys and values: the driver, its softmax, and its products on the tiles of kernels.inc.hpp. Included once per
// level, inside its namespace and target region, after kernels.inc.hpp: no includes, no static locals here.

// Keys are cut at multiples of key_segment, counted from key 0. In a segment a row's scores, their largest, the powers and the sums come
// from the keys that the row sees and no others, in the keys' order; then segments are merged in their order. So a row's bits do not
// depend on the rows that share its tile, on threads, or on whether one thread walked the segments or several shared them out.

// 2^t for t <= 0, and 0 below 2^-126: 2^floor(t) · p(t - floor(t)), p(0) = 1 exactly. p is the polynomial with that constraint and the
// least relative error on [0, 1): 2^-18.4 with `rough`, for results that are rounded to bf16 or that weigh such, else 2^-28.8.
template <bool rough>
[[gnu::always_inline]] inline Vec exp2(Vec exponent) {
  const Vec t = bounded(exponent);
  const Vec r = fraction(t);
  Vec p;
  if constexpr (rough) {
    p = fma(set(0.0134266838F), r, set(0.0522424728F));
    p = fma(p, r, set(0.241280198F));
    p = fma(p, r, set(0.693044841F));
  } else {
    p = fma(set(0.000216129149F), r, set(0.0012467847F));
    p = fma(p, r, set(0.00967545155F));
    p = fma(p, r, set(0.0554852821F));
    p = fma(p, r, set(0.240229309F));
    p = fma(p, r, set(0.693147063F));
  }
  return scale_by_floor(fma(p, r, set(1.0F)), t);
}

// Scores lie in rows a cache line further apart than a power of two, or they would share the sets of the cache. The probabilities
// take their place, in the first half of a row if they are bf16.
inline constexpr std::int64_t score_stride = key_segment + 16;

// The probabilities of one row, not divided by their sum: 2^(s - largest) of the scores [low, high), 0 elsewhere among the `keys`, which
// are whole panels. A row that sees none has the sum 0.
template <class Products>
inline void softmax_row(float* s, std::int64_t low, std::int64_t high, std::int64_t keys, float& largest, float& sum) {
  using X = typename Products::X;
  X* p = reinterpret_cast<X*>(s);
  const std::int64_t begin = low < high ? low / panel_width * panel_width : keys, end = low < high ? round_up(high, panel_width) : keys;
  constexpr float hidden = -__builtin_inff();
  largest = hidden;
  sum = 0.0F;
  if (begin < end) {
    for (std::int64_t j = begin; j < low; ++j) s[j] = hidden;
    for (std::int64_t j = high; j < end; ++j) s[j] = hidden;
    Vec m[2] = {load(s + begin), load(s + begin + width)};
    for (std::int64_t j = begin; j < end; j += panel_width)
      M2LM_UNROLL
      for (int v = 0; v < vectors_per_panel; ++v) m[v % 2] = max(m[v % 2], load(s + j + v * width));
    largest = reduce_max(max(m[0], m[1]));
    const Vec shift = set(largest);
    Vec total[2] = {set(0.0F), set(0.0F)};
    for (std::int64_t j = begin; j < end; j += panel_width) {
      Vec powers[vectors_per_panel];
      M2LM_UNROLL
      for (int v = 0; v < vectors_per_panel; ++v) {
        powers[v] = exp2<Products::rounds>(load(s + j + v * width) - shift);
        total[v % 2] = total[v % 2] + powers[v];
      }
      if constexpr (Products::rounds) {
#if M2LM_CPU_NATIVE_BF16
        store_bf16_pair(powers[0], powers[1], p + j);
#endif
      } else {
        M2LM_UNROLL
        for (int v = 0; v < vectors_per_panel; ++v) store(s + j + v * width, powers[v]);
      }
    }
    sum = reduce_add(total[0] + total[1]);
  }
  if (begin > 0) __builtin_memset(static_cast<void*>(p), 0, static_cast<std::size_t>(begin) * sizeof(X));
  if (end < keys) __builtin_memset(static_cast<void*>(p + end), 0, static_cast<std::size_t>(keys - end) * sizeof(X));
}

// What the products will read next. Rows that are all of a head read its keys and values once, at the speed of memory: while scores are
// made, the values are asked for, and the keys two panels ahead, which the processor does not do across pages; then the next keys.
struct KeysAhead {
  const std::byte* keys = nullptr;  // of the segment; null: nothing is asked for
  const std::byte* values = nullptr;
  std::int64_t key_bytes = 0, value_bytes = 0;      // of a panel of keys; of 32 values and 32 keys
  std::int64_t value_panels = 0, value_stride = 0;  // the latter in bytes

  explicit operator bool() const { return keys != nullptr; }
  static void bytes(const std::byte* p, std::int64_t n) {
    constexpr std::int64_t line = 64;
    for (std::int64_t b = 0; b < n; b += line) __builtin_prefetch(p + b);
  }
  void panel_of_keys(std::int64_t j) const { bytes(keys + j * key_bytes, key_bytes); }
  void before_scores(std::int64_t j) const {
    if (!*this) return;
    panel_of_keys(j + 2);
    for (std::int64_t p = 0; p < value_panels; ++p) bytes(values + p * value_stride + j * value_bytes, value_bytes);
  }
};

// Both products of attention on the tiles of linear layers.
template <class Tile>
struct TileProducts {
  using X = typename Tile::X;
  using W = typename Tile::W;
  static constexpr bool rounds = Tile::bf16_activations;
  static constexpr std::int64_t k_step = Tile::k_step;
  static constexpr std::int64_t rows = 48;  // that share one pass over the keys: enough to use a widened panel several times
  static void convert(const float* x, std::int64_t n, X* out) { Tile::convert(x, n, out); }
  static constexpr std::int64_t wide_floats(std::int64_t dk) { return Tile::widens ? panel_width * (dk > key_segment ? dk : key_segment) : 0; }

  // s[count][score_stride] = q[count][ldq] · keys.
  void scores(std::int64_t count, const X* q, std::int64_t ldq, const W* keys, std::int64_t dk, std::int64_t n, float* s, float* wide, const KeysAhead& ahead) const {
    for (std::int64_t j = 0; j < n; j += panel_width) {
      ahead.before_scores(j / panel_width);
      run_rows_widened<Tile>(count, q, ldq, keys + j * dk, dk, s + j, score_stride, false, wide);
    }
  }
  // y[count][dv] = the probabilities in the rows of s · values, whose panels are `stride` apart.
  void weigh(std::int64_t count, const float* s, const W* values, std::int64_t stride, std::int64_t n, float* y, std::int64_t dv, float* wide,
             const KeysAhead& ahead) const {
    constexpr std::int64_t ldp = score_stride * static_cast<std::int64_t>(sizeof(float) / sizeof(X));
    const X* p = reinterpret_cast<const X*>(s);
    const std::int64_t piece = ahead ? 2 * panel_width : n;  // an element's sum is one chain, however long the pieces are
    for (std::int64_t j = 0; j < n; j += piece) {
      const std::int64_t keys = n - j < piece ? n - j : piece;
      if (ahead)
        for (std::int64_t k = j; k < j + keys; k += panel_width) ahead.panel_of_keys((n + k) / panel_width);
      for (std::int64_t c = 0; c < dv; c += panel_width)
        run_rows_widened<Tile>(count, p + j, ldp, values + c / panel_width * stride + j * panel_width, keys, y + c, dv, j > 0, wide);
    }
  }
};

// What some of the keys make of a tile of rows: y = Σ 2^(s - largest) · v, and Σ 2^(s - largest); the sum 0 says that a row saw none.
struct PartialAttention {
  float* y = nullptr;
  float* largest = nullptr;
  float* sum = nullptr;
  PartialAttention(float* p, std::int64_t rows, std::int64_t dv) : y(p), largest(p + rows * dv), sum(largest + rows) {}
  static constexpr std::int64_t floats(std::int64_t rows, std::int64_t dv) { return rows * (dv + 2); }
};

// One tile of rows of one kv head at a time. A row is a (token, head of the group) pair, so the heads of a GQA group share one pass over
// the keys.
template <class Products>
class AttentionTile {
  using X = typename Products::X;
  using W = typename Products::W;
  static constexpr std::int64_t rows = Products::rows;

  const AttentionJob& job_;
  const Products products_{};
  const std::int64_t dk_, dv_, ldq_, group_;
  const bool causal_;
  X* const q_;
  float* const scores_;
  float* const wide_;
  float* const row_;  // one row of scaled q
  const PartialAttention part_, whole_;
  std::int64_t kv_head_ = 0, row0_ = 0, count_ = 0, begin_key_ = 0, end_key_ = 0;

  static std::int64_t width_of_q(std::int64_t dk) { return round_up(dk, panel_width); }
  static std::int64_t q_floats(std::int64_t dk) { return rows * width_of_q(dk) * static_cast<std::int64_t>(sizeof(X)) / static_cast<std::int64_t>(sizeof(float)); }

 public:
  AttentionTile(const AttentionJob& job, float* scratch)
      : job_(job),
        dk_(round_up(job.head_dim, Products::k_step)),
        dv_(round_up(job.head_dim, panel_width)),
        ldq_(width_of_q(dk_)),
        group_(job.heads / job.kv_heads),
        causal_(job.mask.causal || job.mask.window > 0),
        q_(reinterpret_cast<X*>(scratch)),
        scores_(scratch + q_floats(dk_)),
        wide_(scores_ + rows * score_stride),
        row_(wide_ + Products::wide_floats(dk_)),
        part_(row_ + ldq_, rows, dv_),
        whole_(row_ + ldq_ + PartialAttention::floats(rows, dv_), rows, dv_) {}
  static std::int64_t scratch_floats(std::int64_t head_dim) {
    const std::int64_t dk = round_up(head_dim, Products::k_step), dv = round_up(head_dim, panel_width);
    return q_floats(dk) + rows * score_stride + Products::wide_floats(dk) + width_of_q(dk) + 2 * PartialAttention::floats(rows, dv);
  }

  static std::int64_t tiles_per_head(const AttentionJob& job) { return (job.tokens * (job.heads / job.kv_heads) + rows - 1) / rows; }

  void choose(std::int64_t tile) {
    const std::int64_t tiles = tiles_per_head(job_), all = job_.tokens * group_;
    kv_head_ = tile / tiles;
    row0_ = tile % tiles * rows;
    count_ = all - row0_ < rows ? all - row0_ : rows;
    const std::int64_t first = job_.first + row0_ / group_, last = job_.first + (row0_ + count_ - 1) / group_;
    begin_key_ = job_.mask.window > 0 && first - job_.mask.window + 1 > 0 ? first - job_.mask.window + 1 : 0;
    end_key_ = causal_ && last + 1 < job_.keys ? last + 1 : job_.keys;
  }
  std::int64_t first_segment() const { return begin_key_ / key_segment; }
  std::int64_t end_segment() const { return (end_key_ + key_segment - 1) / key_segment; }

  // q, scaled so that powers of 2 take the place of those of e, which costs no multiplication later.
  void load_queries() const {
    const float scale = static_cast<float>(job_.scale * 1.4426950408889634);
    for (std::int64_t r = 0; r < count_; ++r) {
      const std::int64_t row = row0_ + r, head = M2LM_FAULT(18) ? row % group_ * job_.kv_heads + kv_head_ : kv_head_ * group_ + row % group_;
      const float* source = job_.q + row / group_ * job_.ldq + head * job_.head_dim;
      std::int64_t c = 0;
      for (; c + width <= job_.head_dim; c += width) store(row_ + c, load(source + c) * set(scale));
      for (; c < job_.head_dim; ++c) row_[c] = source[c] * scale;
      for (; c < ldq_; ++c) row_[c] = 0.0F;
      Products::convert(row_, ldq_, q_ + r * ldq_);
    }
  }

  // Asks for row r of the next tile's q and of this tile's y, which lie too far apart for the processor to foresee.
  void prefetch(std::int64_t r) const {
    constexpr std::int64_t line = 16;
    const std::int64_t next = row0_ + rows + r, all = job_.tokens * group_, row = row0_ + r;
    const std::int64_t next_row = next < all ? next : r, next_kv_head = next < all ? kv_head_ : kv_head_ + 1;
    if (next_kv_head < job_.kv_heads && next_row < all) {
      const float* q = job_.q + next_row / group_ * job_.ldq + (next_kv_head * group_ + next_row % group_) * job_.head_dim;
      for (std::int64_t c = 0; c < job_.head_dim; c += line) __builtin_prefetch(q + c, 0);
    }
    const float* y = job_.y + row / group_ * job_.ldy + (kv_head_ * group_ + row % group_) * job_.head_dim;
    for (std::int64_t c = 0; c < job_.head_dim; c += line) __builtin_prefetch(y + c, 1);
  }

  void attend(std::int64_t segment, const PartialAttention& to) const {
    const std::int64_t start = segment * key_segment, stop = start + key_segment < end_key_ ? start + key_segment : end_key_;
    const std::int64_t begin = (start > begin_key_ ? start : begin_key_) / panel_width * panel_width, n = round_up(stop - begin, panel_width);
    const W* keys = reinterpret_cast<const W*>(job_.keys_data) + (kv_head_ * job_.capacity + begin) * dk_;
    const W* values = reinterpret_cast<const W*>(job_.values_data) + kv_head_ * job_.capacity * dv_ + begin * panel_width;
    constexpr auto size = static_cast<std::int64_t>(sizeof(W));
    KeysAhead ahead{.key_bytes = panel_width * dk_ * size, .value_bytes = panel_width * panel_width * size, .value_panels = dv_ / panel_width,
                    .value_stride = job_.capacity * panel_width * size};
    if (job_.tokens * group_ <= rows) {
      ahead.keys = reinterpret_cast<const std::byte*>(keys);
      ahead.values = reinterpret_cast<const std::byte*>(values);
    }
    products_.scores(count_, q_, ldq_, keys, dk_, n, scores_, wide_, ahead);
    for (std::int64_t r = 0; r < count_; ++r) {
      if (segment == first_segment()) prefetch(r);
      const std::int64_t position = job_.first + (row0_ + r) / group_ + (M2LM_FAULT(19) ? 1 : 0);
      const std::int64_t low = job_.mask.window > 0 ? position - job_.mask.window + 1 - begin : 0;
      const std::int64_t high = (causal_ && position + 1 < stop ? position + 1 : stop) - begin;
      softmax_row<Products>(scores_ + r * score_stride, low > 0 ? low : 0, high, n, to.largest[r], to.sum[r]);
    }
    products_.weigh(count_, scores_, values, job_.capacity * panel_width, n, to.y, dv_, wide_, ahead);
  }

  void merge(const PartialAttention& from) const {
    const PartialAttention& to = whole_;
    for (std::int64_t r = 0; r < count_; ++r) {
      if (from.sum[r] == 0.0F) continue;
      const float* y = from.y + r * dv_;
      float* out = to.y + r * dv_;
      const float largest = to.largest[r] > from.largest[r] ? to.largest[r] : from.largest[r];
      const Vec old = exp2<Products::rounds>(set(to.largest[r] - largest)), now = exp2<Products::rounds>(set(from.largest[r] - largest));
      for (std::int64_t c = 0; c < dv_; c += width) store(out + c, fma(load(y + c), now, M2LM_FAULT(17) ? load(out + c) : load(out + c) * old));
      float factors[2 * width];
      store(factors, old);
      store(factors + width, now);
      to.sum[r] = to.sum[r] * factors[0] + from.sum[r] * factors[width];
      to.largest[r] = largest;
    }
  }
  void start() const {
    for (std::int64_t r = 0; r < count_; ++r) {
      whole_.largest[r] = job_.sinks.zero_logit ? 0.0F : -__builtin_inff();  // the sink is as a key that has been seen already
      whole_.sum[r] = job_.sinks.zero_logit ? 1.0F : 0.0F;
      for (std::int64_t c = 0; c < dv_; c += width) store(whole_.y + r * dv_ + c, set(0.0F));
    }
  }
  void finish() const {
    for (std::int64_t r = 0; r < count_; ++r) {
      const std::int64_t row = row0_ + r;
      float* out = job_.y + row / group_ * job_.ldy + (kv_head_ * group_ + row % group_) * job_.head_dim;
      const float* y = whole_.y + r * dv_;
      const float inverse = 1.0F / whole_.sum[r];
      std::int64_t c = 0;
      for (; c + width <= job_.head_dim; c += width) store(out + c, load(y + c) * set(inverse));
      for (; c < job_.head_dim; ++c) out[c] = y[c] * inverse;
    }
  }

  void run_segments() const {
    start();
    load_queries();
    for (std::int64_t segment = first_segment(); segment < end_segment(); ++segment) {
      attend(segment, part_);
      merge(part_);
    }
  }
  // One segment of a tile that several threads share: whoever is the last to come merges what all have left.
  void run_segment(std::int64_t tile, std::int64_t segment) const {
    if (segment < first_segment() || segment >= end_segment()) return;
    const std::int64_t each = PartialAttention::floats(rows, dv_);
    float* of_tile = job_.partials + tile * job_.segments * each;
    load_queries();
    attend(segment, PartialAttention(of_tile + segment * each, rows, dv_));
    if (__atomic_add_fetch(job_.segments_done + tile, 1, __ATOMIC_ACQ_REL) != end_segment() - first_segment()) return;
    start();
    for (std::int64_t s = first_segment(); s < end_segment(); ++s) merge(PartialAttention(of_tile + s * each, rows, dv_));
    finish();
  }
};

// Each thread begins with a range of tiles of its own, so that a head's keys stay in its cache, and then helps the others.
template <class Products>
void attention(const AttentionJob& job, int part, int parts, std::byte* scratch) {
  AttentionTile<Products> tile(job, reinterpret_cast<float*>(scratch));
  const std::int64_t pieces = job.partials ? job.segments : 1, tasks = job.kv_heads * AttentionTile<Products>::tiles_per_head(job) * pieces;
  for (int i = 0; i < parts; ++i) {
    const int owner = (part + i) % parts;
    const Range range = split(tasks, parts, owner);
    const auto take = [&] { return range.begin + __atomic_fetch_add(job.next + owner * next_stride, 1, __ATOMIC_RELAXED); };
    for (std::int64_t task = take(); task < range.end;) {
      tile.choose(task / pieces);
      if (job.partials) {
        tile.run_segment(task / pieces, task % pieces);
        task = take();
      } else {
        tile.run_segments();
        task = take();  // before y is written: it would wait until all of that has reached the cache
        tile.finish();
      }
    }
  }
}

// ---- storing keys and values ------------------------------------------------------------------------------------------------

// The bits of a vector, and 16 of each lane. By the compiler's vector extension: every level rounds as to_bf16 does.
using Bits [[gnu::vector_size(sizeof(Vec))]] = std::uint32_t;
using HalfBits [[gnu::vector_size(sizeof(Vec) / 2)]] = std::uint16_t;

// bf16 of `width` numbers, in the upper halves.
inline Bits upper_bf16(const float* x) {
  Bits u;
  __builtin_memcpy(&u, x, sizeof(u));
  return (u & 0x7fffffffU) > 0x7f800000U ? u | 0x400000U : u + 0x7fffU + ((u >> 16) & 1U);
}
inline void round_row(const float* x, std::int64_t n, std::uint16_t* y) {
  std::int64_t i = 0;
  for (; i + width <= n; i += width) {
    const HalfBits half = __builtin_convertvector(upper_bf16(x + i) >> 16, HalfBits);
    __builtin_memcpy(y + i, &half, sizeof(half));
  }
  for (; i < n; ++i) y[i] = m2lm::to_bf16(x[i]).bits;
}

// Keys of one panel, which begin at its key `lane`: rows of x [count][d] become its columns.
inline void append_keys(const float* x, std::int64_t ldx, std::int64_t count, std::int64_t d, std::int64_t lane, float* panel) {
  for (std::int64_t c = 0; c < d; ++c)
    for (std::int64_t t = 0; t < count; ++t) panel[c * panel_width + lane + t] = x[t * ldx + c];
}
inline void append_keys(const float* x, std::int64_t ldx, std::int64_t count, std::int64_t d, std::int64_t lane, std::uint16_t* panel) {
  constexpr std::int64_t chunk = 128;  // inputs at a time, so that the transposition stays in L1
  std::uint16_t rows[panel_width][chunk];
  for (std::int64_t c = 0; c < d; c += chunk) {
    const std::int64_t n = d - c < chunk ? d - c : chunk;
    for (std::int64_t t = 0; t < count; ++t) {
      round_row(x + t * ldx + c, n, rows[t]);
      if (n % 2 != 0) rows[t][n] = 0;  // n < chunk
    }
    for (std::int64_t i = 0; i < n; i += 2) {
      std::uint16_t* out = panel + (c + i) * panel_width + lane * 2;
      for (std::int64_t t = 0; t < count; ++t) __builtin_memcpy(out + t * 2, &rows[t][i], 4);
    }
  }
}

// Values of keys key, key + 1, …
inline void append_values(const float* x, std::int64_t ldx, std::int64_t count, std::int64_t d, std::int64_t key, float* values, std::int64_t capacity) {
  for (std::int64_t t = 0; t < count; ++t)
    for (std::int64_t c = 0; c < d; c += panel_width)
      __builtin_memcpy(values + c * capacity + (key + t) * panel_width, x + t * ldx + c, static_cast<std::size_t>(d - c < panel_width ? d - c : panel_width) * sizeof(float));
}
inline void append_values(const float* x, std::int64_t ldx, std::int64_t count, std::int64_t d, std::int64_t key, std::uint16_t* values, std::int64_t capacity) {
  const auto at = [&](std::int64_t k, std::int64_t c) { return values + c / panel_width * panel_width * capacity + k / 2 * 2 * panel_width + c % panel_width * 2 + k % 2; };
  for (std::int64_t t = 0; t < count; ++t) {
    const float* row = x + t * ldx;
    std::int64_t c = 0;
    if ((key + t) % 2 == 0 && t + 1 < count) {  // two keys lie side by side
      const float* next = row + ldx;
      for (; c + width <= d; c += width) {
        const Bits both = (upper_bf16(row + c) >> 16) | (upper_bf16(next + c) & 0xffff0000U);
        __builtin_memcpy(at(key + t, c), &both, sizeof(both));
      }
      for (std::int64_t e = c; e < d; ++e) *at(key + t + 1, e) = m2lm::to_bf16(next[e]).bits;
      for (; c < d; ++c) *at(key + t, c) = m2lm::to_bf16(row[c]).bits;
      ++t;
      continue;
    }
    for (; c < d; ++c) *at(key + t, c) = m2lm::to_bf16(row[c]).bits;
  }
}

// One head's keys and values of `tokens` positions from `first` on. A panel that begins with them is zero behind them: attention multiplies what
// lies there by 0.
template <class W>
void append(const float* k, std::int64_t ld_k, const float* v, std::int64_t ld_v, std::int64_t tokens, std::int64_t first, const KeyValues& kv, std::int64_t head) {
  const std::int64_t d = kv.head_dim, dk = round_up(d, static_cast<std::int64_t>(sizeof(float) / sizeof(W))), dv = round_up(d, panel_width);
  W* keys = reinterpret_cast<W*>(kv.keys) + head * kv.capacity * dk;
  W* values = reinterpret_cast<W*>(kv.values) + head * kv.capacity * dv;
  const std::int64_t start = first - (M2LM_FAULT(21) && first > 0 ? 1 : 0);
  for (std::int64_t t = 0; t < tokens;) {
    const std::int64_t key = start + t, lane = key % panel_width, count = tokens - t < panel_width - lane ? tokens - t : panel_width - lane;
    if (lane == 0 && count < panel_width) {
      __builtin_memset(static_cast<void*>(keys + key * dk), 0, static_cast<std::size_t>(panel_width * dk) * sizeof(W));
      for (std::int64_t c = 0; c < dv; c += panel_width)
        __builtin_memset(static_cast<void*>(values + c * kv.capacity + key * panel_width), 0, static_cast<std::size_t>(panel_width * panel_width) * sizeof(W));
    }
    append_keys(k + t * ld_k + head * d, ld_k, count, d, lane, keys + (key - lane) * dk);
    append_values(v + t * ld_v + head * d, ld_v, count, d, key, values, kv.capacity);
    t += count;
  }
}

template <class Products>
AttentionKernels attention_kernels() {
  return {.rows = Products::rows,
          .run = &attention<Products>,
          .append = &append<typename Products::W>,
          .scratch = [](std::int64_t head_dim) { return static_cast<std::size_t>(round_up(AttentionTile<Products>::scratch_floats(head_dim) * 4, 64)); },
          .partial_floats = [](std::int64_t head_dim) { return PartialAttention::floats(Products::rows, round_up(head_dim, panel_width)); }};
}

template <class Tile>
AttentionKernels attention_on_vectors() {
  return attention_kernels<TileProducts<Tile>>();
}
