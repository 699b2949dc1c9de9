// Products by AMX with weights in bf16, and in 8 bits with one scale per row (w8a8): tiles of 16 rows of x and 16 outputs. Included inside a
// namespace of level amx and its target region, behind tiles_amx.
//
// x is rounded to bf16 once, for all threads, in tiles: QuantisedRows of two bytes per value, [row tiles][k/32][16][32]. A panel
// [k/2][32][2] is two columns of tiles as it is. Every output is one chain of TDPBF16PS over k in steps of 32 in ascending order, kept in
// f32 between blocks: so a row has the same bits alone and in a batch. Of w8a8 a strip is a column of tiles of 64 inputs, and the sums are
// exact: TDPBSUD multiplies the bytes as they lie, and wraps.

inline constexpr std::int64_t step_inputs = 32;                            // of a product of tiles of bf16: 64 bytes
inline constexpr std::int64_t step_bytes = panel_width * tile_row_bytes;  // of a panel: two tiles
// 32 KB of a panel stay in L1 while the rows pass by; 1 MB of x stays in L2 (2 MB where there is AMX) while the panels pass by.
inline constexpr std::int64_t block_steps = 16;
inline constexpr std::int64_t rows_in_cache = std::int64_t{1} << 20;
inline constexpr std::int64_t most_rows = 512;
// Where so few rows of x fit that the weights were read too often: rows, steps of a chunk of them (512 KB, so that the next chunk fits beside
// it), and panels that pass by a chunk; their sums (512 KB) wait in L2 for the next.
inline constexpr std::int64_t chunk_rows = 256, chunk_steps = 32, chunk_panels = 16;
// With so few rows the weights are what a product waits for; DRAM is asked so far ahead. Where the two strips of a panel lie apart, each is asked
// for by itself, and nearer: into L2, and a step ahead into L1.
inline constexpr std::int64_t stream_tiles = 2, stream_distance = 16384, strip_distance = 3072;

// Outputs of a thread, in bytes, from which on they are written past the caches, which would read every line first: 1.2 to 1.3 times as fast on the
// whole product. Fewer are found in a cache by who reads them next: from 4 MiB on, a language model of 1.1 B parameters took 1.1 times as long.
inline constexpr std::int64_t most_kept_outputs = std::int64_t{1} << 23;
inline bool writes_past_caches(const GemmJob& job, int parts) {
  const std::int64_t outputs = job.gated ? job.n / 2 : job.n;
  const bool on_lines = reinterpret_cast<std::uintptr_t>(job.y) % 64 == 0 && job.ldy % (64 / static_cast<std::int64_t>(sizeof(float))) == 0;
  return on_lines && job.m * outputs * static_cast<std::int64_t>(sizeof(float)) > most_kept_outputs * parts;
}

/// Rows at once, and steps of a chunk of them.
struct GemmWalk {
  std::int64_t rows = 0, steps = 0;
};
inline GemmWalk gemm_walk(std::int64_t m, std::int64_t steps) {
  constexpr std::int64_t pair = 2 * tile_height;
  const std::int64_t fit = rows_in_cache / ((steps > 0 ? steps : 1) * tile_row_bytes) / pair * pair;
  if (fit < chunk_rows && fit < m) return {m < chunk_rows ? round_up(m, tile_height) : chunk_rows, chunk_steps};
  // Evenly: 577 rows are two blocks of 304 or less, not one of 512 and one of 65.
  const std::int64_t most = fit < most_rows ? fit : most_rows, blocks = (m + most - 1) / most;
  return {round_up((m + blocks - 1) / blocks, tile_height), steps > 0 ? steps : 1};
}

/// Memory to ask for while a product runs: `lines` cache lines per step, from `at` on; with `strips` what lies ahead in each strip.
struct Ahead {
  const std::byte* at = nullptr;
  std::int64_t lines = 0;
  bool strips = false;
};

/// What a panel's tiles are made of.
struct Bf16Products {
  static constexpr bool dequantises = false;  // a panel is multiplied as it lies, but for a last step that is not full
  static constexpr std::int64_t row_stride = panel_width * 4, panel_step = step_bytes;
  static constexpr std::int64_t second_strip(std::int64_t) { return tile_row_bytes; }
  static constexpr bool strips_apart = false;
  static constexpr std::int64_t most_block_steps = block_steps;
  static constexpr std::int64_t panel_bytes(std::int64_t k) { return k * panel_width * 2; }
  static constexpr std::int64_t full_steps(std::int64_t k) { return k / step_inputs; }
  template <int sum, int x, int w>
  [[gnu::always_inline]] static void add() {
    tile_dot_bf16<sum, x, w>();
  }
  static void finish(const GemmJob&, const std::byte*, float*, std::int64_t, std::int64_t) {}
};

struct W8a8Products {
  static constexpr bool dequantises = false;
  static constexpr QuantisedFormat layout = quantised_format(DType::w8a8);
  static constexpr std::int64_t row_stride = tile_row_bytes, panel_step = step_bytes / 2;
  static constexpr std::int64_t second_strip(std::int64_t k) { return layout.strip_bytes(k); }
  static constexpr bool strips_apart = true;
  // So many steps are one block still: a short one behind a full one would cost all sums a store and a load.
  static constexpr std::int64_t most_block_steps = 24;
  static constexpr std::int64_t panel_bytes(std::int64_t k) { return 2 * layout.strip_bytes(k); }
  static constexpr std::int64_t full_steps(std::int64_t k) { return k / layout.chunk; }
  template <int sum, int x, int w>
  [[gnu::always_inline]] static void add() {
    tile_dot_bytes<sum, x, w>();
  }
  static void finish(const GemmJob& job, const std::byte* panel, float* c, std::int64_t row0, std::int64_t rows) {
    cpu_avx512::vnni::scale_bytes(job.rows, row0, rows, panel + layout.values_bytes(job.k), second_strip(job.k), c);
  }
};

/// c[16 · tiles][32] (+)= x · w over `steps` steps of a panel, and over `tail` if that is not null. x: a tile of 16 rows, the other
/// `tile_distance` behind it, and each tile's next step `x_step` behind the one before.
template <class Products, int tiles>
[[gnu::noinline]] void multiply_tiles(const std::byte* x, std::int64_t x_step, std::int64_t tile_distance, const std::byte* w, std::int64_t second,
                                      std::int64_t steps, const std::byte* tail, float* c, bool accumulate, Ahead ahead) {
  constexpr std::int64_t ldc = panel_width * 4, other = panel_width * tile_height;
  if (accumulate) {
    tile_load<0>(c, ldc);
    tile_load<1>(c + strip_width, ldc);
    if constexpr (tiles == 2) {
      tile_load<2>(c + other, ldc);
      tile_load<3>(c + other + strip_width, ldc);
    }
  } else {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  }
  const auto ask = [&](const std::byte* strip) {
    if constexpr (Products::strips_apart)
      for (std::int64_t line = 0; ahead.strips && line < Products::panel_step; line += 64) {
        __builtin_prefetch(strip + Products::panel_step + line, 0, 3);
        __builtin_prefetch(strip + strip_distance + line, 0, 2);
      }
  };
  const auto step = [&](const std::byte* panel) {
    ask(panel);
    tile_load<6>(panel, Products::row_stride);
    tile_load_once<4>(x, tile_row_bytes);
    Products::template add<0, 4, 6>();
    ask(panel + second);
    tile_load<7>(panel + second, Products::row_stride);
    Products::template add<1, 4, 7>();
    if constexpr (tiles == 2) {
      tile_load_once<5>(x + tile_distance, tile_row_bytes);
      Products::template add<2, 5, 6>();
      Products::template add<3, 5, 7>();
    }
    x += x_step;
  };
  for (std::int64_t s = 0; s < steps; ++s, w += Products::panel_step) {
    step(w);
    for (std::int64_t i = 0; i < ahead.lines; ++i, ahead.at += 64) __builtin_prefetch(ahead.at, 0, 2);
  }
  if (tail) step(tail);
  tile_store<0>(c, ldc);
  tile_store<1>(c + strip_width, ldc);
  if constexpr (tiles == 2) {
    tile_store<2>(c + other, ldc);
    tile_store<3>(c + other + strip_width, ldc);
  }
}

/// Bytes of what is made of a panel to be multiplied in its place: a block of it, or the last step.
template <class Products>
inline constexpr std::int64_t made_bytes = (Products::dequantises ? block_steps : 1) * step_bytes;

template <class Products>
std::size_t tile_gemm_scratch(std::int64_t m) {
  // And the sums of a group of panels, or of more rows of one.
  const std::int64_t rows = m < chunk_rows ? round_up(m, tile_height) : chunk_rows;
  return static_cast<std::size_t>(rows * panel_width * chunk_panels * 4 + made_bytes<Products>);
}

// Threads share out the panels, and with few panels and many rows the rows too; each walks blocks of rows, groups of panels, chunks of inputs,
// panels and blocks of inputs.
template <class Products>
void tile_gemm(const GemmJob& job, int part, int parts, std::byte* scratch) {
  const std::int64_t width_of_panel = job.gated ? panel_width / 2 : panel_width;
  const std::int64_t panels = round_up(job.gated ? job.n / 2 : job.n, width_of_panel) / width_of_panel;
  int row_parts = 1;
  while (parts / row_parts % 2 == 0 && panels * row_parts < parts * 4 && job.m >= row_parts * tile_height * 8) row_parts *= 2;
  const Range my_rows = split(job.m, row_parts, part % row_parts, tile_height);
  const Range my_panels = split(panels, parts / row_parts, part / row_parts);
  const std::int64_t steps = job.rows.chunks, full_steps = Products::full_steps(job.k);
  const std::int64_t panel_bytes = Products::panel_bytes(job.k), second = Products::second_strip(job.k), panel_step = Products::panel_step;
  constexpr bool dequantises = Products::dequantises;
  const bool past_caches = writes_past_caches(job, parts);
  const auto finish = [&](std::int64_t panel, float* c, std::int64_t first_row, std::int64_t count) {
    Products::finish(job, job.w + panel * panel_bytes, c, first_row, count);
    finish_panel(job, c, first_row, count, panel, past_caches);
  };
  const GemmWalk walk = gemm_walk(my_rows.end - my_rows.begin, steps);
  const bool chunked = walk.steps < steps;
  const std::int64_t group = chunked ? chunk_panels : 1, sums_of_panel = walk.rows * panel_width;
  std::byte* made = scratch;
  float* sums = reinterpret_cast<float*>(scratch + made_bytes<Products>);
  __builtin_memset(made, 0, static_cast<std::size_t>(step_bytes));

  TileShapes shapes;
  for (int tile = 0; tile < 6; ++tile) shapes.set(tile, job.rows.group, tile_row_bytes);  // sums and rows
  for (int tile = 6; tile < 8; ++tile) shapes.set(tile, tile_height, tile_row_bytes);     // weights
  const TileUnit unit(shapes);

  const std::int64_t x_step = job.rows.group * tile_row_bytes, tile_distance = x_step * steps;
  for (std::int64_t row0 = my_rows.begin; row0 < my_rows.end; row0 += walk.rows) {
    const std::int64_t rows = my_rows.end - row0 < walk.rows ? my_rows.end - row0 : walk.rows;
    const std::int64_t tiles = (rows + tile_height - 1) / tile_height, pairs = (tiles + 1) / 2;
    const std::byte* x = reinterpret_cast<const std::byte*>(job.rows.values) + row0 / tile_height * tile_distance;
    const std::int64_t at_once = (tiles <= stream_tiles && !dequantises) || walk.steps <= Products::most_block_steps ? walk.steps : block_steps;
    for (std::int64_t first = my_panels.begin; first < my_panels.end; first += group) {
      const std::int64_t last = my_panels.end - first < group ? my_panels.end : first + group;
      for (std::int64_t chunk = 0; chunk < steps || chunk == 0; chunk += walk.steps) {
        const std::int64_t chunk_end = steps - chunk < walk.steps ? steps : chunk + walk.steps;
        for (std::int64_t panel = first; panel < last; ++panel) {
          float* c = sums + (panel - first) * sums_of_panel;
          for (std::int64_t s = chunk; s < chunk_end || s == 0; s += at_once) {
            const std::int64_t end = chunk_end - s < at_once ? chunk_end : s + at_once;
            const std::byte* w = job.w + panel * panel_bytes + s * panel_step;
            const bool partial = end > full_steps;
            const std::int64_t whole = end - s - (partial ? 1 : 0);
            if (partial) __builtin_memcpy(made, w + whole * step_bytes, static_cast<std::size_t>(panel_bytes - full_steps * step_bytes));
            if constexpr (dequantises) {
              Products::dequantise(job.w + panel * panel_bytes, job.k, s, end, made);
              w = made;
            }
            // In a stream what lies some steps ahead; else the next block, in pieces.
            const std::byte* next = end < chunk_end || !chunked ? w + (end - s) * panel_step : w - (s - chunk) * panel_step + panel_bytes;
            const std::int64_t lines = (step_bytes / 64 + pairs - 1) / pairs;
            for (std::int64_t t = 0; t < tiles; t += 2) {
              const bool stream = tiles <= stream_tiles, strips = stream && Products::strips_apart;
              const Ahead ahead{.at = stream ? w + stream_distance : next + t / 2 * lines * 64 * at_once,
                                .lines = strips || dequantises ? 0 : lines,
                                .strips = strips};
              const std::byte* rows_of_x = x + t * tile_distance + s * x_step;
              float* to = c + t * tile_height * panel_width;
              if (t + 1 < tiles)
                multiply_tiles<Products, 2>(rows_of_x, x_step, tile_distance, w, second, whole, partial ? made : nullptr, to, s > 0, ahead);
              else
                multiply_tiles<Products, 1>(rows_of_x, x_step, tile_distance, w, second, whole, partial ? made : nullptr, to, s > 0, ahead);
              // What is written past the caches leaves while the next tiles are multiplied.
              const std::int64_t row = t * tile_height, most = 2 * tile_height;
              if (past_caches && end >= steps) finish(panel, to, row0 + row, rows - row < most ? rows - row : most);
            }
          }
          if (chunk_end < steps) continue;
          if (!past_caches) finish(panel, c, row0, rows);
        }
      }
    }
  }
  if (past_caches) _mm_sfence();
}

// A row of x in bf16, in its place among the tiles.
inline void round_row(const float* x, std::int64_t cols, const QuantisedRows& rows, std::int64_t row) {
  auto* to = reinterpret_cast<Bf16*>(rows.values) + rows.first_chunk(row) * step_inputs;
  for (std::int64_t b = 0; b < rows.chunks; ++b, to += rows.group * step_inputs) {
    const float* from = x + b * step_inputs;
    float edge[step_inputs] = {};
    if (const std::int64_t given = cols - b * step_inputs; given < step_inputs) {
      for (std::int64_t i = 0; i < given; ++i) edge[i] = from[i];
      from = edge;
    }
    convert_bf16(from, to);
    convert_bf16(from + width, to + width);
  }
}

/// The kernels of bf16 weights, around the attention of another level's.
inline FormatKernels bf16_kernels(const FormatKernels& vectors) {
  FormatKernels kernels = vectors;
  kernels.quantise = &round_row;
  kernels.row_group = tile_height;
  kernels.value_bytes = 2;
  kernels.gemm = &tile_gemm<Bf16Products>;
  kernels.gemm_scratch = &tile_gemm_scratch<Bf16Products>;
  return kernels;
}
