// Products with weights that are integers (q8, q4, q4_128, w8a8), written over a level's Vec and its Ints and BlockWeights: included once per way to
// multiply bytes, inside a namespace of the level and its target region: no includes, no static locals here.
//
// All arithmetic inside a block is exact, and outside it is the same at every level that has fused multiply-adds; so is the rounding
// of x: those levels agree bit by bit.

inline constexpr int vectors_per_strip = static_cast<int>(strip_width) / width;

// Rows up to which the weights are what a product waits for.
inline constexpr int prefetch_rows = 4;

// What a thread that reads from one end to the other asks for. DRAM wants to be asked far ahead, and into L2: L1 has few places to wait in; and L2
// a little ahead, or the loads that wait for it leave no room for those behind them. Every line once: asking twice takes a place too.
struct Stream {
  static constexpr std::int64_t line = 64, into_l1 = 1024, into_l2 = 3072;
  const std::byte *near, *far;

  [[gnu::always_inline]] explicit Stream(const std::byte* begin) : near(begin + into_l1), far(begin + into_l2) {}
  // Before what ends at `end` is read.
  [[gnu::always_inline]] void read_to(const std::byte* end) {
    for (; near < end + into_l1; near += line) __builtin_prefetch(near, 0, 3);
    for (; far < end + into_l2; far += line) __builtin_prefetch(far, 0, 2);
  }
};

// Vectors of a strip that are computed together: all for one row, which the weights are read for once; else one, so that a block of
// weights and the sums fit into the registers.
template <int Rows>
inline constexpr int vectors_together = Rows == 1 ? vectors_per_strip : 1;

// c[Rows][16] = x[Rows][k] · strip, of rows of one group, where 32 inputs share a scale. Every output is one chain of fused multiply-adds
// over the blocks in ascending order, whatever `Rows` is.
template <DType format, int Rows>
[[gnu::noinline]] void multiply_short(const QuantisedRows& rows, std::int64_t row, const std::byte* strip, float* c) {
  constexpr int together = vectors_together<Rows>;
  for (int first = 0; first < vectors_per_strip; first += together) {
    const std::int8_t* x = rows.values + rows.first_block(row) * block_values;
    const float* scales = rows.scales + rows.first_block(row);
    const std::int32_t* starts = rows.starts + rows.first_block(row);
    const std::byte* tile = strip;
    const std::byte* const end = strip + rows.blocks * tile_bytes(format);
    Stream stream(strip);
    Vec sum[Rows][together];
    M2LM_UNROLL
    for (int r = 0; r < Rows; ++r)
      M2LM_UNROLL
      for (int v = 0; v < together; ++v) sum[r][v] = set(0.0F);
    for (; tile < end; tile += tile_bytes(format), x += rows.group * block_values, scales += rows.group, starts += rows.group) {
      if constexpr (Rows <= prefetch_rows) stream.read_to(tile + tile_bytes(format));
      M2LM_UNROLL
      for (int v = 0; v < together; ++v) {
        const BlockWeights<quantised_format(format).bits> w(tile + (first + v) * width * 4);
        const Vec weight_scale = load_halves(tile + tile_values_bytes(format) + (first + v) * width * 2);
        constexpr int turns = Rows < rows_in_turn ? Rows : rows_in_turn;
        M2LM_UNROLL
        for (int r = 0; r < Rows; r += turns) {
          Ints products[turns];
          M2LM_UNROLL
          for (int i = 0; i < turns; ++i) products[i] = set_ints(starts[r + i]);
          w.template add<block_values>(x + r * block_values, products);
          M2LM_UNROLL
          for (int i = 0; i < turns; ++i) sum[r + i][v] = fma(to_vec(products[i]) * weight_scale, set(scales[r + i]), sum[r + i][v]);
        }
      }
    }
    M2LM_UNROLL
    for (int r = 0; r < Rows; ++r)
      M2LM_UNROLL
      for (int v = 0; v < together; ++v) store(c + r * panel_width + (first + v) * width, sum[r][v]);
  }
}

// The same where more inputs share a scale: the sums of integers stay in the registers until it is their turn, and those of floats in c.
template <DType format, int Rows>
[[gnu::noinline]] void multiply_long(const QuantisedRows& rows, std::int64_t row, const std::byte* strip, float* c) {
  constexpr int together = vectors_together<Rows>;
  constexpr QuantisedFormat layout = quantised_format(format);
  constexpr std::int64_t chunk_bytes = layout.chunk / 32 * layout.piece_bytes();
  for (int first = 0; first < vectors_per_strip; first += together) {
    const std::int8_t* x = rows.values + rows.first_chunk(row) * layout.chunk;
    const float* scales = rows.scales + rows.first_block(row);
    const std::int32_t* starts = rows.starts + rows.first_block(row);
    const std::byte* tile = strip;
    Stream stream(strip);
    M2LM_UNROLL
    for (int r = 0; r < Rows; ++r)
      M2LM_UNROLL
      for (int v = 0; v < together; ++v) store(c + r * panel_width + (first + v) * width, set(0.0F));
    for (std::int64_t block = 0; block < rows.blocks; ++block, scales += rows.group, starts += rows.group) {
      Ints sum[together][Rows];
      M2LM_UNROLL
      for (int v = 0; v < together; ++v)
        M2LM_UNROLL
        for (int r = 0; r < Rows; ++r) sum[v][r] = set_ints(starts[r]);
      for (const std::byte* const end = tile + layout.values_bytes(rows.block); tile < end; tile += chunk_bytes, x += rows.group * layout.chunk) {
        if constexpr (Rows <= prefetch_rows) stream.read_to(tile + chunk_bytes);
        M2LM_UNROLL
        for (std::int64_t piece = 0; piece < layout.chunk / 32; ++piece)
          M2LM_UNROLL
          for (int v = 0; v < together; ++v) {
            const BlockWeights<layout.bits> w(tile + piece * layout.piece_bytes() + (first + v) * width * 4);
            w.template add<layout.chunk>(x + piece * 32, sum[v]);
          }
      }
      M2LM_UNROLL
      for (int v = 0; v < together; ++v) {
        const std::byte* of_weights = tile + (first + v) * width * layout.scale_bytes;
        Vec weight_scale;
        if constexpr (layout.scale_bytes == 2)
          weight_scale = load_halves(of_weights);
        else
          weight_scale = load(reinterpret_cast<const float*>(of_weights));
        M2LM_UNROLL
        for (int r = 0; r < Rows; ++r) {
          float* to = c + r * panel_width + (first + v) * width;
          store(to, fma(to_vec(sum[v][r]) * weight_scale, set(scales[r]), load(to)));
        }
      }
      tile += strip_width * layout.scale_bytes;
    }
  }
}

// Any number of rows from the first of a group on, in tiles of block_rows, then of half as many and so on.
template <DType format, int Rows = block_rows>
void multiply_rows(const QuantisedRows& quantised, std::int64_t row, std::int64_t rows, const std::byte* strip, float* c) {
  std::int64_t r = 0;
  for (; r + Rows <= rows; r += Rows) {
    if constexpr (quantised_format(format).scale_inputs == block_values)
      multiply_short<format, Rows>(quantised, row + r, strip, c + r * panel_width);
    else
      multiply_long<format, Rows>(quantised, row + r, strip, c + r * panel_width);
  }
  if constexpr (Rows > 1)
    if (r < rows) multiply_rows<format, Rows / 2>(quantised, row + r, rows - r, strip, c + r * panel_width);
}

// Rows that pass by a strip, which stays in L1: their blocks (512 KB) stay in L2 meanwhile.
inline constexpr std::int64_t most_rows_at_once = 240;
inline std::int64_t rows_at_once(std::int64_t k) {
  const std::int64_t fit = (std::int64_t{1} << 19) / (k > 0 ? k : 1) / block_rows * block_rows;
  return fit < block_rows ? block_rows : fit > most_rows_at_once ? most_rows_at_once / block_rows * block_rows : fit;
}

inline std::size_t block_gemm_scratch(std::int64_t m) {
  const std::int64_t rows = m < most_rows_at_once ? m : most_rows_at_once;
  return static_cast<std::size_t>(rows * panel_width) * sizeof(float);
}

using MultiplyRows = void (*)(const QuantisedRows&, std::int64_t row, std::int64_t rows, const std::byte* strip, float* c);

// Threads share out the panels, and with few panels and many rows the rows too; each walks blocks of rows, and panels inside them.
inline void block_gemm(const GemmJob& job, int part, int parts, std::byte* scratch, std::int64_t strip_bytes, MultiplyRows multiply) {
  const std::int64_t step = job.gated ? panel_width / 2 : panel_width;
  const std::int64_t panels = round_up(job.gated ? job.n / 2 : job.n, step) / step;
  int row_parts = 1;
  while (parts / row_parts % 2 == 0 && panels * row_parts < parts * 4 && job.m >= row_parts * block_rows * 8) row_parts *= 2;
  const Range my_rows = split(job.m, row_parts, part % row_parts, block_rows);
  const Range my_panels = split(panels, parts / row_parts, part / row_parts);
  float* sums = reinterpret_cast<float*>(scratch);
  const std::int64_t at_once = rows_at_once(job.k);
  for (std::int64_t row = my_rows.begin; row < my_rows.end; row += at_once) {
    const std::int64_t rows = my_rows.end - row < at_once ? my_rows.end - row : at_once;
    for (std::int64_t panel = my_panels.begin; panel < my_panels.end; ++panel) {
      for (std::int64_t half = 0; half < 2; ++half) multiply(job.rows, row, rows, job.w + (panel * 2 + half) * strip_bytes, sums + half * strip_width);
      finish_panel(job, sums, row, rows, panel);
    }
  }
}

// Blocks of a row of x, of whatever length: see QuantisedRows. 32 inputs at a time: first for the largest, then to round them.
inline void quantise_row(const float* x, std::int64_t cols, const QuantisedRows& rows, std::int64_t row) {
  constexpr int vectors = static_cast<int>(block_values) / width;
  std::int8_t* values = rows.values + rows.first_chunk(row) * rows.chunk;
  float* scales = rows.scales + rows.first_block(row);
  std::int32_t* starts = rows.starts + rows.first_block(row);
  float edge[block_values] = {};
  const auto piece = [&](std::int64_t at) {
    const std::int64_t given = cols - at;
    if (given >= block_values) return x + at;
    for (std::int64_t i = 0; i < block_values; ++i) edge[i] = i < given ? x[at + i] : 0.0F;
    return static_cast<const float*>(edge);
  };
  std::int64_t in_chunk = 0;
  for (std::int64_t b = 0; b < rows.blocks; ++b, scales += rows.group, starts += rows.group) {
    const std::int64_t begin = b * rows.block, end = begin + rows.block;
    Vec largest = set(0.0F), nothing = set(0.0F);
    for (std::int64_t at = begin; at < end; at += block_values) {
      const float* from = piece(at);
      M2LM_UNROLL
      for (int i = 0; i < vectors; ++i) {
        const Vec v = load(from + i * width);
        largest = max(largest, max(v, set(0.0F) - v));
        nothing = nothing + (v - v);  // NaN if an element is not finite
      }
    }
    const float scale = reduce_max(largest) / 127.0F;
    const float inverse = 1.0F / scale;
    *scales = scale + reduce_add(nothing);
    const bool usable = *scales == scale && inverse <= 3.4028234e38F;  // a scale of 0 has no inverse, and a very small one too
    Vec total = set(0.0F);
    for (std::int64_t at = begin; at < end; at += block_values) {
      if (usable) {
        const float* from = piece(at);
        M2LM_UNROLL
        for (int i = 0; i < vectors; ++i) {
          const Vec rounded = round(load(from + i * width) * set(inverse));
          store_bytes(values + in_chunk + i * width, rounded);
          total = total + rounded;
        }
      } else {
        __builtin_memset(values + in_chunk, 0, static_cast<std::size_t>(block_values));
      }
      in_chunk += block_values;
      if (in_chunk < rows.chunk) continue;
      in_chunk = 0;
      values += rows.group * rows.chunk;
    }
    *starts = -rows.offset * static_cast<std::int32_t>(reduce_add(total));
  }
}

template <DType format>
void block_gemm_of(const GemmJob& job, int part, int parts, std::byte* scratch) {
  block_gemm(job, part, parts, scratch, quantised_format(format).strip_bytes(job.k), &multiply_rows<format>);
}

template <DType format>
FormatKernels block_kernels() {
  return {.bf16_activations = false,
          .k_step = quantised_format(format).k_step,
          .quantise = &quantise_row,
          .row_group = block_rows,
          .gemm = &block_gemm_of<format>,
          .gemm_scratch = &block_gemm_scratch,
          .attention = {}};
}

inline KernelTable with_blocks(KernelTable table, bool int8_dot) {
  table.q8 = block_kernels<DType::q8>();
  table.q4 = block_kernels<DType::q4>();
  table.q4_128 = block_kernels<DType::q4_128>();
  table.w8a8 = block_kernels<DType::w8a8>();
  table.int8_dot = int8_dot;
  return table;
}
