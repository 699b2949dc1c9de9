// The kernels of one instruction-set level, written over that level's Vec. Included once per level, inside its namespace and
// target region: no includes, no static locals here.

inline constexpr int vectors_per_panel = static_cast<int>(panel_width) / width;

// exp(x) to about 2 ulp: 2^n · p(r), r in [-ln2/2, ln2/2]; below the smallest normal result it is 0.
inline Vec exp(Vec x) {
  const Vec limit = set(-87.3F);
  const Vec c = min(max(x, limit), set(88.3F));
  const Vec n = round(c * set(1.44269504F));
  const Vec r = fma(n, set(2.12194440e-4F), fma(n, set(-0.693359375F), c));  // ln 2 in two pieces: 0.693359375 - 2.1219444e-4
  Vec p = set(1.98756915e-4F);
  p = fma(p, r, set(1.39819995e-3F));
  p = fma(p, r, set(8.33345205e-3F));
  p = fma(p, r, set(4.16657962e-2F));
  p = fma(p, r, set(1.66666657e-1F));
  p = fma(p, r, set(5.00000012e-1F));
  p = fma(p * r, r, r) + set(1.0F);
  return zero_where_below(x, limit, scale_by_power(p, n));
}

inline Vec logistic(Vec x) { return set(1.0F) / (set(1.0F) + exp(set(0.0F) - x)); }

// erf by Abramowitz & Stegun 7.1.26: |error| <= 1.5e-7.
inline Vec erf(Vec x) {
  const Vec a = max(x, set(0.0F) - x);
  const Vec t = set(1.0F) / fma(set(0.3275911F), a, set(1.0F));
  Vec p = set(1.061405429F);
  p = fma(p, t, set(-1.453152027F));
  p = fma(p, t, set(1.421413741F));
  p = fma(p, t, set(-0.284496736F));
  p = fma(p, t, set(0.254829592F));
  const Vec y = set(1.0F) - p * t * exp(set(0.0F) - a * a);
  const Vec positive = zero_where_below(x, set(0.0F), y);
  return positive - zero_where_below(set(0.0F) - x, set(0.0F), y) + zero_where_below(set(0.0F) - a, set(0.0F), y);
}

inline Vec activate(Activation activation, Vec x) {
  switch (activation) {
    case Activation::none: break;
    case Activation::relu: return max(x, set(0.0F));
    case Activation::silu: return x * logistic(x);
    case Activation::gelu: return set(0.5F) * x * (set(1.0F) + erf(x * set(0.707106781F)));
    case Activation::gelu_tanh: return x * logistic(set(1.5957691216F) * fma(set(0.044715F) * x * x, x, x));
    case Activation::quick_gelu: return x * logistic(set(1.702F) * x);
  }
  return x;
}

// ---- tiles: c[rows][32] (+)= x[rows][k] · panel ---------------------------------------------------------------------------
// Every element is one chain of fused multiply-adds over k in ascending order, whatever `Rows` is: so a row has the same bits
// alone and in a batch.

template <int Rows>
struct Sums {
  Vec sum[Rows][vectors_per_panel];

  [[gnu::always_inline]] Sums(const float* c, std::int64_t ldc, bool accumulate) {
    M2LM_UNROLL
    for (int r = 0; r < Rows; ++r)
      M2LM_UNROLL
      for (int v = 0; v < vectors_per_panel; ++v) sum[r][v] = accumulate ? load(c + r * ldc + v * width) : set(0.0F);
  }
  // One input: sum[r][·] += x[r * ldx] · b[·].
  [[gnu::always_inline]] void step(const float* x, std::int64_t ldx, const Vec (&b)[vectors_per_panel]) {
    M2LM_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const Vec a = set(x[r * ldx]);
      M2LM_UNROLL
      for (int v = 0; v < vectors_per_panel; ++v) sum[r][v] = fma(a, b[v], sum[r][v]);
    }
  }
  // One input, one vector of outputs: sum[·][v] += a[·] · b.
  [[gnu::always_inline]] void step(const Vec (&a)[Rows], int v, Vec b) {
    M2LM_UNROLL
    for (int r = 0; r < Rows; ++r) sum[r][v] = fma(a[r], b, sum[r][v]);
  }
  [[gnu::always_inline]] void store_to(float* c, std::int64_t ldc) const {
    M2LM_UNROLL
    for (int r = 0; r < Rows; ++r)
      M2LM_UNROLL
      for (int v = 0; v < vectors_per_panel; ++v) store(c + r * ldc + v * width, sum[r][v]);
  }
};

// Not inlined: the callers' values would take registers that the sums need.
// With 32 vector registers a step keeps the vectors of w and walks the rows; with 16 it keeps the x of its few rows and walks w.
inline constexpr bool walk_rows = width == 16;

struct F32Tile {
  using X = float;
  using W = float;
  static constexpr std::int64_t k_step = 1;
  static constexpr bool bf16_activations = false;
  static constexpr bool widens = false;

  template <int Rows>
  [[gnu::noinline]] static void run(const X* x, std::int64_t ldx, const W* w, std::int64_t k, float* c, std::int64_t ldc, bool accumulate) {
    Sums<Rows> s(c, ldc, accumulate);
    for (std::int64_t i = 0; i < k; ++i, w += panel_width) {
      if constexpr (walk_rows) {
        Vec b[vectors_per_panel];
        M2LM_UNROLL
        for (int v = 0; v < vectors_per_panel; ++v) b[v] = load(w + v * width);
        s.step(x + i, ldx, b);
      } else {
        Vec a[Rows];
        M2LM_UNROLL
        for (int r = 0; r < Rows; ++r) a[r] = set(x[r * ldx + i]);
        M2LM_UNROLL
        for (int v = 0; v < vectors_per_panel; ++v) s.step(a, v, load(w + v * width));
      }
    }
    s.store_to(c, ldc);
  }
  static void convert(const float* x, std::int64_t n, X* out) { __builtin_memcpy(out, x, static_cast<std::size_t>(n) * sizeof(float)); }
};

// bf16 weights, f32 activations: a bf16 is the upper half of an f32, so a shift and a mask widen a pair.
struct Bf16Tile {
  using X = float;
  using W = std::uint16_t;
  static constexpr std::int64_t k_step = 2;
  static constexpr bool bf16_activations = false;
  static constexpr bool widens = true;

  template <int Rows>
  [[gnu::noinline]] static void run(const X* x, std::int64_t ldx, const W* w, std::int64_t k, float* c, std::int64_t ldc, bool accumulate) {
    Sums<Rows> s(c, ldc, accumulate);
    for (std::int64_t i = 0; i < k; i += 2, w += panel_width * 2) {
      if constexpr (walk_rows) {
        Vec even[vectors_per_panel], odd[vectors_per_panel];
        M2LM_UNROLL
        for (int v = 0; v < vectors_per_panel; ++v) {
          even[v] = load_bf16_even(w + v * width * 2);
          odd[v] = load_bf16_odd(w + v * width * 2);
        }
        s.step(x + i, ldx, even);
        s.step(x + i + 1, ldx, odd);
      } else {
        Vec a[Rows];
        M2LM_UNROLL
        for (int r = 0; r < Rows; ++r) a[r] = set(x[r * ldx + i]);
        M2LM_UNROLL
        for (int v = 0; v < vectors_per_panel; ++v) s.step(a, v, load_bf16_even(w + v * width * 2));
        asm("" : "+r"(w));  // load w again below: there is no register to keep it in
        M2LM_UNROLL
        for (int r = 0; r < Rows; ++r) a[r] = set(x[r * ldx + i + 1]);
        M2LM_UNROLL
        for (int v = 0; v < vectors_per_panel; ++v) s.step(a, v, load_bf16_odd(w + v * width * 2));
      }
    }
    s.store_to(c, ldc);
  }
  static void convert(const float* x, std::int64_t n, X* out) { __builtin_memcpy(out, x, static_cast<std::size_t>(n) * sizeof(float)); }

  // The same panel in f32: for many rows it is cheaper to widen once. F32Tile then does the same operations in the same order.
  static void widen(const W* w, std::int64_t k, float* out) {
    for (std::int64_t i = 0; i < k; i += 2)
      for (int v = 0; v < vectors_per_panel; ++v) {
        store(out + i * panel_width + v * width, load_bf16_even(w + i * panel_width + v * width * 2));
        store(out + (i + 1) * panel_width + v * width, load_bf16_odd(w + i * panel_width + v * width * 2));
      }
  }
};

#if M2LM_CPU_NATIVE_BF16
// bf16 weights and activations: VDPBF16PS, two products per lane and instruction.
struct Bf16DotTile {
  using X = std::uint16_t;
  using W = std::uint16_t;
  static constexpr std::int64_t k_step = 2;
  static constexpr bool bf16_activations = true;
  static constexpr bool widens = false;

  template <int Rows>
  [[gnu::noinline]] static void run(const X* x, std::int64_t ldx, const W* w, std::int64_t k, float* c, std::int64_t ldc, bool accumulate) {
    Sums<Rows> s(c, ldc, accumulate);
    for (std::int64_t i = 0; i < k; i += 2, w += panel_width * 2) {
      M2LM_UNROLL
      for (int r = 0; r < Rows; ++r)
        M2LM_UNROLL
        for (int v = 0; v < vectors_per_panel; ++v) s.sum[r][v] = dot_bf16_pairs(s.sum[r][v], x + r * ldx + i, w + v * width * 2);
    }
    s.store_to(c, ldc);
  }
  static void convert(const float* x, std::int64_t n, X* out) {
    std::int64_t i = 0;
    Bf16* y = reinterpret_cast<Bf16*>(out);
    for (; i + width <= n; i += width) convert_bf16(x + i, y + i);
    for (; i < n; ++i) y[i] = m2lm::to_bf16(x[i]);
  }
};
#endif

// Any number of rows, in tiles of tile_rows, then of 8, 4, 2 and 1 (few sizes: each is code to compile).
template <class Tile, int Rows = tile_rows>
inline void run_rows(std::int64_t rows, const typename Tile::X* x, std::int64_t ldx, const typename Tile::W* w, std::int64_t k, float* c,
                     std::int64_t ldc, bool accumulate) {
  std::int64_t r = 0;
  for (; r + Rows <= rows; r += Rows) Tile::template run<Rows>(x + r * ldx, ldx, w, k, c + r * ldc, ldc, accumulate);
  if constexpr (Rows > 1) {
    constexpr int next = Rows > 8 ? 8 : (Rows > 4 ? 4 : (Rows > 2 ? 2 : 1));
    if (r < rows) run_rows<Tile, next>(rows - r, x + r * ldx, ldx, w, k, c + r * ldc, ldc, accumulate);
  }
}

// Rows from which on a panel of narrow weights is widened first.
inline constexpr std::int64_t widen_from = tile_rows * 3 < 12 ? 12 : tile_rows * 3;

// run_rows, or the same on a panel that is widened first where that pays.
template <class Tile>
inline void run_rows_widened(std::int64_t rows, const typename Tile::X* x, std::int64_t ldx, const typename Tile::W* w, std::int64_t k, float* c,
                             std::int64_t ldc, bool accumulate, [[maybe_unused]] float* wide) {
  if constexpr (Tile::widens) {
    if (rows >= widen_from) {
      Tile::widen(w, k, wide);
      run_rows<F32Tile>(rows, x, ldx, wide, k, c, ldc, accumulate);
      return;
    }
  }
  run_rows<Tile>(rows, x, ldx, w, k, c, ldc, accumulate);
}

// ---- GEMM -----------------------------------------------------------------------------------------------------------------

// Blocks for an L1 of 32 to 48 KB and an L2 of 1 MB or more: 32 KB of a panel stay in L1 while all rows of a block pass by; the rows of x (516 KB)
// stay in L2, and of the sums of a group of panels (1.5 MB) what fits: to read the weights and to copy x less often is worth more than the rest
// of them. No block size changes a bit of the result.
inline constexpr std::int64_t gemm_row_block = 516;
inline constexpr std::int64_t gemm_panel_group = 24;

template <class Tile>
inline constexpr std::int64_t gemm_k_block = 32768 / (panel_width * static_cast<std::int64_t>(Tile::widens ? sizeof(float) : sizeof(typename Tile::W)));
// Rows of x in the buffer lie a cache line further apart than a power of two, or they would share the sets of the cache.
template <class Tile>
inline constexpr std::int64_t gemm_ldx = gemm_k_block<Tile> + 64 / static_cast<std::int64_t>(sizeof(typename Tile::X));

// Rows from which on a tile asks for its share of the next block of weights, and for the outputs that it finishes: with fewer there is so much to ask
// for at once that the tile waits for it, and the processor sees the stream by itself.
template <class Tile>
inline constexpr std::int64_t gemm_ask_from = sizeof(typename Tile::W) == sizeof(float) ? 25 : 36;

// The rows of a block, evenly: 577 rows are two blocks of 300 or less, not one of 516 and one of 61.
inline std::int64_t gemm_rows_per_block(std::int64_t m) {
  const std::int64_t blocks = (m + gemm_row_block - 1) / gemm_row_block;
  return blocks == 0 ? 0 : round_up((m + blocks - 1) / blocks, tile_rows);
}

template <class Tile>
std::size_t gemm_scratch(std::int64_t m) {
  const std::int64_t rows = m < gemm_row_block ? round_up(m, tile_rows) : gemm_row_block;
  const std::int64_t x = rows * gemm_ldx<Tile> * static_cast<std::int64_t>(sizeof(typename Tile::X));
  const std::int64_t sums = rows * panel_width * gemm_panel_group * static_cast<std::int64_t>(sizeof(float));
  const std::int64_t wide = Tile::widens && rows >= widen_from ? gemm_k_block<Tile> * panel_width * static_cast<std::int64_t>(sizeof(float)) : 0;
  return static_cast<std::size_t>(sums + round_up(x, 64) + wide);
}

// `past_caches`: y is too large to stay in them. requires then: y and its rows on cache lines, and a fence behind the last panel.
inline void finish_panel(const GemmJob& job, const float* sums, std::int64_t row0, std::int64_t rows, std::int64_t panel, bool past_caches = false) {
  const std::int64_t outputs = job.gated ? job.n / 2 : job.n;
  const std::int64_t step = job.gated ? panel_width / 2 : panel_width;
  const std::int64_t column = panel * step;
  const std::int64_t valid = outputs - column < step ? outputs - column : step;
  const int vectors = job.gated ? vectors_per_panel / 2 : vectors_per_panel;
  float bias[panel_width] = {}, second_bias[panel_width] = {}, edge[panel_width] = {};
  if (job.bias) {
    __builtin_memcpy(bias, job.bias + column, static_cast<std::size_t>(valid) * sizeof(float));
    if (job.gated) __builtin_memcpy(second_bias, job.bias + outputs + column, static_cast<std::size_t>(valid) * sizeof(float));
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    const float* c = sums + r * panel_width;
    const float* residual = job.residual ? job.residual + (row0 + r) * job.ld_residual + column : nullptr;
    float* out = job.y + (row0 + r) * job.ldy + column;
    float* y = out;
    if (valid < step) {
      if (residual) {
        __builtin_memcpy(edge, residual, static_cast<std::size_t>(valid) * sizeof(float));
        residual = edge;
      }
      y = edge;
    }
    for (int v = 0; v < vectors; ++v) {
      Vec value = activate(job.activation, load(c + v * width) + load(bias + v * width));
      if (job.gated) value = value * (load(c + panel_width / 2 + v * width) + load(second_bias + v * width));
      if (residual) value = value + load(residual + v * width);
      if (past_caches && valid == step)
        store_past_caches(y + v * width, value);
      else
        store(y + v * width, value);
    }
    if (valid < step) __builtin_memcpy(out, edge, static_cast<std::size_t>(valid) * sizeof(float));
  }
}

// Threads share out the panels, and with few panels and many rows the rows too. Each walks blocks of rows, groups of panels and
// blocks of inputs; sums stay in scratch between the blocks of inputs.
template <class Tile>
void gemm(const GemmJob& job, int part, int parts, std::byte* scratch) {
  using X = typename Tile::X;
  using W = typename Tile::W;
  constexpr std::int64_t k_block = gemm_k_block<Tile>, ldx = gemm_ldx<Tile>;
  const std::int64_t step = job.gated ? panel_width / 2 : panel_width;
  const std::int64_t panels = round_up(job.gated ? job.n / 2 : job.n, step) / step;
  int row_parts = 1;
  while (parts / row_parts % 2 == 0 && panels * row_parts < parts * 4 && job.m >= row_parts * tile_rows * 8) row_parts *= 2;
  const Range my_rows = split(job.m, row_parts, part % row_parts, tile_rows);
  const Range my_panels = split(panels, parts / row_parts, part / row_parts);
  const std::int64_t row_block = gemm_rows_per_block(my_rows.end - my_rows.begin);
  const std::int64_t block_sums = row_block * panel_width;  // of one panel
  float* sums = reinterpret_cast<float*>(scratch);
  X* x = reinterpret_cast<X*>(sums + block_sums * gemm_panel_group);
  float* wide =
      reinterpret_cast<float*>(reinterpret_cast<std::byte*>(x) + round_up(row_block * ldx * static_cast<std::int64_t>(sizeof(X)), 64));
  const W* w = reinterpret_cast<const W*>(job.w);

  for (std::int64_t row0 = my_rows.begin; row0 < my_rows.end; row0 += row_block) {
    const std::int64_t rows = my_rows.end - row0 < row_block ? my_rows.end - row0 : row_block;
    for (std::int64_t first = my_panels.begin; first < my_panels.end; first += gemm_panel_group) {
      const std::int64_t last = my_panels.end - first < gemm_panel_group ? my_panels.end : first + gemm_panel_group;
      for (std::int64_t k0 = 0; k0 < job.k || k0 == 0; k0 += k_block) {
        const std::int64_t k = job.k - k0 < k_block ? job.k - k0 : k_block;
        if (M2LM_FAULT(16) && k0 + k == job.k && k0 > 0) continue;  // the last k block dropped
        const std::int64_t given = job.cols - k0 < k ? job.cols - k0 : k;  // the rest is padding
        for (std::int64_t r = 0; r < rows; ++r) {
          Tile::convert(job.x + (row0 + r) * job.ldx + k0, given, x + r * ldx);
          for (std::int64_t i = given; i < k; ++i) x[r * ldx + i] = X{};
        }
        const bool last_inputs = k0 + k >= job.k;
        for (std::int64_t panel = first; panel < last; ++panel) {
          const W* block = w + panel * job.k * panel_width + k0 * panel_width;
          // The same inputs of the next panel, or the next inputs of the first one.
          const W* next = panel + 1 < last ? block + job.k * panel_width : w + first * job.k * panel_width + (k0 + k) * panel_width;
          float* c = sums + (panel - first) * block_sums;
          const auto pass = [&]<class Products>(const typename Products::W* weights) {
            for (std::int64_t r = 0; r < rows; r += tile_rows) {
              const std::int64_t here = rows - r < tile_rows ? rows - r : tile_rows;
              if (rows >= gemm_ask_from<Tile>) {
                const std::int64_t begin = k * r / rows * panel_width, end = k * (r + here) / rows * panel_width;
                for (std::int64_t i = begin; i < end; i += 64 / static_cast<std::int64_t>(sizeof(W))) __builtin_prefetch(next + i, 0, 2);
                for (std::int64_t i = row0 + r; last_inputs && i < row0 + r + here; ++i)
                  for (std::int64_t column = 0; column < step; column += 16) __builtin_prefetch(job.y + i * job.ldy + panel * step + column, 1, 3);
              }
              run_rows<Products>(here, x + r * ldx, ldx, weights, k, c + r * panel_width, panel_width, k0 > 0);
              if (last_inputs) finish_panel(job, c + r * panel_width, row0 + r, here, panel);
            }
          };
          if constexpr (Tile::widens) {
            if (rows >= widen_from) {
              Tile::widen(block, k, wide);
              pass.template operator()<F32Tile>(wide);
              continue;
            }
          }
          pass.template operator()<Tile>(block);
        }
      }
    }
  }
}

// ---- rows -----------------------------------------------------------------------------------------------------------------

inline void rms_norm(const float* x, const float* weight, float eps, float* y, std::int64_t n) {
  Vec squares = set(0.0F);
  std::int64_t i = 0;
  for (; i + width <= n; i += width) squares = fma(load(x + i), load(x + i), squares);
  float total = reduce_add(squares);
  for (; i < n; ++i) total += x[i] * x[i];
  const float inverse = 1.0F / __builtin_sqrtf(total / static_cast<float>(n) + eps);
  for (i = 0; i + width <= n; i += width) store(y + i, load(x + i) * set(inverse) * load(weight + i));
  for (; i < n; ++i) y[i] = x[i] * inverse * weight[i];
}

inline void layer_norm(const float* x, const float* weight, const float* bias, float eps, float* y, std::int64_t n) {
  Vec sums = set(0.0F);
  std::int64_t i = 0;
  for (; i + width <= n; i += width) sums = sums + load(x + i);
  float total = reduce_add(sums);
  for (; i < n; ++i) total += x[i];
  const float mean = total / static_cast<float>(n);
  Vec squares = set(0.0F);
  for (i = 0; i + width <= n; i += width) {
    const Vec c = load(x + i) - set(mean);
    squares = fma(c, c, squares);
  }
  float variance = reduce_add(squares);
  for (; i < n; ++i) variance += (x[i] - mean) * (x[i] - mean);
  const float inverse = 1.0F / __builtin_sqrtf(variance / static_cast<float>(n) + eps);
  for (i = 0; i + width <= n; i += width)
    store(y + i, fma((load(x + i) - set(mean)) * set(inverse), load(weight + i), load(bias + i)));
  for (; i < n; ++i) y[i] = (x[i] - mean) * inverse * weight[i] + bias[i];
}

inline void rope(float* x, std::int64_t heads, std::int64_t head_dim, const float* cos, const float* sin) {
  const std::int64_t half = head_dim / 2;
  for (std::int64_t h = 0; h < heads; ++h) {
    float* a = x + h * head_dim;
    float* b = a + half;
    std::int64_t i = 0;
    for (; i + width <= half; i += width) {
      const Vec u = load(a + i), v = load(b + i), c = load(cos + i), s = load(sin + i);
      store(a + i, u * c - v * s);
      store(b + i, v * c + u * s);
    }
    for (; i < half; ++i) {
      const float u = a[i], v = b[i];
      a[i] = u * cos[i] - v * sin[i];
      b[i] = v * cos[i] + u * sin[i];
    }
  }
}

inline void add(float* x, const float* addend, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + width <= n; i += width) store(x + i, load(x + i) + load(addend + i));
  for (; i < n; ++i) x[i] += addend[i];
}

// In attention.inc.hpp.
template <class Tile>
AttentionKernels attention_on_vectors();

template <class Tile>
inline FormatKernels format_kernels() {
  return {.bf16_activations = Tile::bf16_activations,
          .k_step = Tile::k_step,
          .gemm = &gemm<Tile>,
          .gemm_scratch = &gemm_scratch<Tile>,
          .attention = attention_on_vectors<Tile>()};
}

inline TrainingKernels training_kernels();  // in training.inc.hpp

inline KernelTable make_table(IsaLevel level, [[maybe_unused]] bool bf16_dot) {
  KernelTable table{.level = level,
                    .f32 = format_kernels<F32Tile>(),
                    .bf16 = format_kernels<Bf16Tile>(),
                    .rms_norm = &rms_norm,
                    .layer_norm = &layer_norm,
                    .rope = &rope,
                    .add = &add,
                    .training = training_kernels()};
#if M2LM_CPU_NATIVE_BF16
  if (bf16_dot) table.bf16 = format_kernels<Bf16DotTile>();
#endif
  return table;
}
