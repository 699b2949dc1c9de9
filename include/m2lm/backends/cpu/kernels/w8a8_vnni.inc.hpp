// Products of many rows with weights in 8 bits that share a scale per output (w8a8), by VPDPBUSD on 512 bits. Included inside a namespace of a
// level with that, behind its blocks, and its target region.
//
// What bounds such a product is how often its registers are loaded: six rows of x and 64 outputs are 24 chains of sums and ten loads per 24
// instructions; sixteen rows and 16 outputs, which blocks of 32 inputs are left with, take 17 loads for 16. The sums are exact, and stay in the registers
// for all inputs: the weights of a tile come from L2 as fast.

inline constexpr std::int64_t byte_rows = 6;  // of a tile
inline constexpr int byte_strips = 4;         // of a tile: two panels

// c[strips/2][6][32] = x[6][64 · chunks] · strips. x: chunks of six rows side by side.
template <int strips>
[[gnu::noinline]] void multiply_bytes(const std::int8_t* x, const std::byte* w, std::int64_t strip_bytes, std::int64_t chunks, std::int32_t* c) {
  constexpr std::int64_t chunk = quantised_format(DType::w8a8).chunk;
  Ints sum[byte_rows][strips];
  M2LM_UNROLL
  for (int r = 0; r < byte_rows; ++r)
    M2LM_UNROLL
    for (int v = 0; v < strips; ++v) sum[r][v] = set_ints(0);
  for (const std::byte* const last = w + chunks * strip_width * chunk; w < last; x += byte_rows * chunk) {
    const std::int8_t* inputs = x;
    for (const std::byte* const end = w + strip_width * chunk; w < end; w += 2 * width * 4, inputs += 8) {
      M2LM_UNROLL
      for (int j = 0; j < 2; ++j) {
        Ints weights[strips];
        M2LM_UNROLL
        for (int v = 0; v < strips; ++v) weights[v] = load_ints(w + v * strip_bytes + j * width * 4);
        M2LM_UNROLL
        for (int r = 0; r < byte_rows; ++r) {
          std::int32_t bytes = 0;
          __builtin_memcpy(&bytes, inputs + r * chunk + j * 4, sizeof(bytes));
          const Ints four = set_ints(bytes);
          M2LM_UNROLL
          for (int v = 0; v < strips; ++v) sum[r][v] = dot_four(sum[r][v], weights[v], four);
        }
      }
    }
  }
  M2LM_UNROLL
  for (int r = 0; r < byte_rows; ++r)
    M2LM_UNROLL
    for (int v = 0; v < strips; ++v) _mm512_storeu_si512(c + v / 2 * byte_rows * panel_width + r * panel_width + v % 2 * width, sum[r][v]);
}

// Sums of integers, c[rows][32] of a panel, become those of floats, in place. scales: of the weights of a strip, and of the next one.
inline void scale_bytes(const QuantisedRows& quantised, std::int64_t row0, std::int64_t rows, const std::byte* scales, std::int64_t strip_bytes, float* c) {
  Vec weight_scale[2];
  for (int v = 0; v < 2; ++v) weight_scale[v] = load(reinterpret_cast<const float*>(scales + v * strip_bytes));
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t block = row0 + r;  // a row is one
    const Ints start = set_ints(quantised.starts[block]);
    for (int v = 0; v < 2; ++v) {
      float* at = c + r * panel_width + v * width;
      const Vec products = to_vec(add_ints(_mm512_loadu_si512(at), start));
      store(at, fma(products * weight_scale[v], set(quantised.scales[block]), set(0.0F)));
    }
  }
}

inline std::size_t byte_gemm_scratch(std::int64_t m) {
  constexpr std::size_t own = byte_rows * panel_width * 2 * sizeof(float);
  return m < byte_rows && block_gemm_scratch(m) > own ? block_gemm_scratch(m) : own;
}

// As block_gemm, two panels at a time.
inline void byte_gemm(const GemmJob& job, int part, int parts, std::byte* scratch) {
  constexpr QuantisedFormat layout = quantised_format(DType::w8a8);
  if (job.rows.group < byte_rows) return block_gemm_of<DType::w8a8>(job, part, parts, scratch);
  const std::int64_t step = job.gated ? panel_width / 2 : panel_width, strip_bytes = layout.strip_bytes(job.k);
  const std::int64_t panels = round_up(job.gated ? job.n / 2 : job.n, step) / step;
  int row_parts = 1;
  while (parts / row_parts % 2 == 0 && panels * row_parts < parts * 8 && job.m >= row_parts * byte_rows * 16) row_parts *= 2;
  const Range my_rows = split(job.m, row_parts, part % row_parts, byte_rows);
  const Range my_panels = split(panels, parts / row_parts, part / row_parts, 2);
  const std::int64_t at_once = round_up(rows_at_once(job.k), byte_rows);
  auto* sums = reinterpret_cast<float*>(scratch);
  for (std::int64_t row0 = my_rows.begin; row0 < my_rows.end; row0 += at_once) {
    const std::int64_t end = my_rows.end - row0 < at_once ? my_rows.end : row0 + at_once;
    for (std::int64_t panel = my_panels.begin; panel < my_panels.end; panel += 2) {
      const bool pair = panel + 1 < my_panels.end;
      const auto multiply = pair ? &multiply_bytes<byte_strips> : &multiply_bytes<byte_strips / 2>;
      for (std::int64_t row = row0; row < end; row += byte_rows) {
        const std::int64_t rows = end - row < byte_rows ? end - row : byte_rows;
        for (std::int64_t r = row; r < row + rows; ++r)  // what is written soon
          for (std::int64_t at = 0; at < (pair ? 2 : 1) * step; at += strip_width) __builtin_prefetch(job.y + r * job.ldy + panel * step + at, 1, 3);
        const std::byte* w = job.w + panel * 2 * strip_bytes;
        multiply(job.rows.values + job.rows.first_chunk(row) * layout.chunk, w, strip_bytes, job.rows.chunks, reinterpret_cast<std::int32_t*>(sums));
        for (std::int64_t p = 0; p < (pair ? 2 : 1); ++p) {
          float* c = sums + p * byte_rows * panel_width;
          scale_bytes(job.rows, row, rows, w + p * 2 * strip_bytes + layout.values_bytes(job.k), strip_bytes, c);
          finish_panel(job, c, row, rows, panel + p);
        }
      }
    }
  }
}

inline KernelTable with_byte_tiles(KernelTable table) {
  table = with_blocks(table, true);
  table.w8a8.row_group = byte_rows;
  table.w8a8.gemm = &byte_gemm;
  table.w8a8.gemm_scratch = &byte_gemm_scratch;
  return table;
}
