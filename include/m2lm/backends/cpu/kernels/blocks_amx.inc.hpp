// Products by AMX with weights in blocks (q8, q4, q4_128): tiles of 16 rows of x and a strip of 16 outputs. Included inside a namespace of
// level amx and its target region, behind gemm_amx.
//
// A strip is unpacked to signed bytes once for all rows that pass by it. The sums of a block are exact and go through L1 to the vector unit,
// which does what the kernels of the other levels do, in their order: bit by bit the same.

using cpu_avx512::vnni::load_halves;

// Rows of a tile from which on a product of tiles is worth its set-up; with fewer the kernels of VNNI.
inline constexpr std::int64_t tile_from = 5;
// Inputs of a strip that are unpacked at once: 32 KB, which stay in L1.
inline constexpr std::int64_t unpacked_inputs = 2048;

// Pieces of 32 inputs of a strip from `first` on, as signed bytes [8][16][4].
template <DType format>
inline void unpack(const std::byte* strip, std::int64_t first, std::int64_t count, std::byte* to) {
  constexpr QuantisedFormat layout = quantised_format(format);
  constexpr std::int64_t pieces = layout.inputs_of_tile(0) / 32;  // of a tile
  for (std::int64_t p = first; p < first + count; ++p, to += strip_width * 32) {
    const std::byte* from = strip + p / pieces * tile_bytes(format) + p % pieces * layout.piece_bytes();
    if constexpr (layout.bits == 8) {
      M2LM_UNROLL
      for (int j = 0; j < 8; ++j) _mm512_storeu_si512(to + j * 64, _mm512_xor_si512(_mm512_loadu_si512(from + j * 64), _mm512_set1_epi8(-128)));
    } else {
      const __m512i low = _mm512_set1_epi8(15), offset = _mm512_set1_epi8(8);
      M2LM_UNROLL
      for (int j = 0; j < 4; ++j) {
        const __m512i bytes = _mm512_loadu_si512(from + j * 64);
        _mm512_storeu_si512(to + j * 64, _mm512_sub_epi8(_mm512_and_si512(bytes, low), offset));
        _mm512_storeu_si512(to + (4 + j) * 64, _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(bytes, 4), low), offset));
      }
    }
  }
}

// c[16][16] (+)= a tile of rows · blocks [first, first + count) of a strip. `products`: room for two tiles of sums. requires count > 0.
template <DType format>
[[gnu::noinline]] void multiply_blocks(const QuantisedRows& rows, std::int64_t row, const std::byte* unpacked, const std::byte* strip, std::int64_t first,
                                       std::int64_t count, float* c, std::int32_t* products) {
  constexpr QuantisedFormat layout = quantised_format(format);
  constexpr std::int64_t chunks = layout.scale_inputs / layout.chunk, x_step = tile_height * layout.chunk, w_step = strip_width * layout.chunk;
  const auto* x = reinterpret_cast<const std::byte*>(rows.values) + (rows.first_chunk(row) + first * chunks * tile_height) * layout.chunk;
  const float* scales = rows.scales + rows.first_block(row) + first * tile_height;
  const std::byte* of_weights = strip + first * tile_bytes(format) + tile_values_bytes(format);
  Vec sum[tile_height];
  M2LM_UNROLL
  for (int r = 0; r < tile_height; ++r) sum[r] = first == 0 ? set(0.0F) : load(c + r * panel_width);
  const auto multiply = [&]<int tile>() {
    tile_zero<tile>();
    M2LM_UNROLL
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk, x += x_step, unpacked += w_step) {
      tile_load_once<4 + tile>(x, layout.chunk);
      tile_load<6 + tile>(unpacked, tile_row_bytes);
      tile_dot_signed_bytes<tile, 4 + tile, 6 + tile>();
    }
  };
  const auto keep = [&]<int tile>() { tile_store<tile>(products + tile * tile_height * strip_width, tile_row_bytes); };
  const auto scale = [&](int tile) {
    const Vec weight_scale = load_halves(of_weights);
    M2LM_UNROLL
    for (int r = 0; r < tile_height; ++r) {
      const Vec value = _mm512_maskz_cvtepi32_ps(all_lanes, _mm512_load_si512(products + (tile * tile_height + r) * strip_width));
      sum[r] = fma(value * weight_scale, set(scales[r]), sum[r]);
    }
    scales += tile_height;
    of_weights += tile_bytes(format);
  };
  // A tile's sums leave it just before the block that takes its place: so the tile unit is busy while the vector unit scales.
  multiply.template operator()<0>();
  if (count > 1) multiply.template operator()<1>();
  for (std::int64_t b = 0; b < count; b += 2) {
    keep.template operator()<0>();
    if (b + 2 < count) multiply.template operator()<0>();
    scale(0);
    if (b + 1 == count) break;
    keep.template operator()<1>();
    if (b + 3 < count) multiply.template operator()<1>();
    scale(1);
  }
  M2LM_UNROLL
  for (int r = 0; r < tile_height; ++r) store(c + r * panel_width, sum[r]);
}

// Rows that pass by a strip.
inline std::int64_t block_rows_at_once(std::int64_t k) {
  const std::int64_t fit = rows_in_cache / (k > 0 ? k : 1) / tile_height * tile_height;
  return fit < tile_height ? tile_height : fit > most_rows ? most_rows : fit;
}

inline constexpr std::int64_t products_bytes = 2 * tile_height * tile_row_bytes, unpacked_bytes = unpacked_inputs * strip_width;

inline std::size_t block_gemm_scratch(std::int64_t m) {
  const std::int64_t rows = m < most_rows ? round_up(m, tile_height) : most_rows;
  return static_cast<std::size_t>(products_bytes + unpacked_bytes + rows * panel_width * 4);
}

// As block_gemm of the other levels.
template <DType format>
void block_gemm(const GemmJob& job, int part, int parts, std::byte* scratch) {
  constexpr QuantisedFormat layout = quantised_format(format);
  if (job.rows.group < tile_height) return cpu_avx512::vnni::block_gemm_of<format>(job, part, parts, scratch);
  const std::int64_t step = job.gated ? panel_width / 2 : panel_width;
  const std::int64_t panels = round_up(job.gated ? job.n / 2 : job.n, step) / step, strip_bytes = layout.strip_bytes(job.k);
  int row_parts = 1;
  while (parts / row_parts % 2 == 0 && panels * row_parts < parts * 4 && job.m >= row_parts * tile_height * 8) row_parts *= 2;
  const Range my_rows = split(job.m, row_parts, part % row_parts, tile_height);
  const Range my_panels = split(panels, parts / row_parts, part / row_parts);
  auto* products = reinterpret_cast<std::int32_t*>(scratch);
  std::byte* unpacked = scratch + products_bytes;
  auto* sums = reinterpret_cast<float*>(unpacked + unpacked_bytes);

  TileShapes shapes;
  for (int tile = 0; tile < 2; ++tile) shapes.set(tile, tile_height, tile_row_bytes);    // sums
  for (int tile = 4; tile < 6; ++tile) shapes.set(tile, tile_height, layout.chunk);      // rows
  for (int tile = 6; tile < 8; ++tile) shapes.set(tile, layout.chunk / 4, tile_row_bytes);  // weights
  const TileUnit unit(shapes);

  constexpr std::int64_t blocks_at_once = unpacked_inputs / layout.scale_inputs;
  const std::int64_t at_once = block_rows_at_once(job.k);
  for (std::int64_t row0 = my_rows.begin; row0 < my_rows.end; row0 += at_once) {
    const std::int64_t rows = my_rows.end - row0 < at_once ? my_rows.end - row0 : at_once;
    const std::int64_t alone = job.k == 0 ? rows : rows % tile_height < tile_from ? rows % tile_height : 0, in_tiles = rows - alone;
    for (std::int64_t panel = my_panels.begin; panel < my_panels.end; ++panel) {
      for (std::int64_t half = 0; half < 2; ++half) {
        const std::byte* strip = job.w + (panel * 2 + half) * strip_bytes;
        float* c = sums + half * strip_width;
        for (std::int64_t first = 0; first < job.rows.blocks; first += blocks_at_once) {
          const std::int64_t count = job.rows.blocks - first < blocks_at_once ? job.rows.blocks - first : blocks_at_once;
          unpack<format>(strip, first * layout.scale_inputs / 32, count * layout.scale_inputs / 32, unpacked);
          for (std::int64_t r = 0; r < in_tiles; r += tile_height)
            multiply_blocks<format>(job.rows, row0 + r, unpacked, strip, first, count, c + r * panel_width, products);
        }
        if (alone > 0) cpu_avx512::vnni::multiply_rows<format>(job.rows, row0 + in_tiles, alone, strip, c + in_tiles * panel_width);
      }
      finish_panel(job, sums, row0, rows, panel);
    }
  }
}

template <DType format>
FormatKernels block_kernels() {
  FormatKernels kernels = cpu_avx512::vnni::block_kernels<format>();
  kernels.row_group = tile_height;
  kernels.gemm = &block_gemm<format>;
  kernels.gemm_scratch = &block_gemm_scratch;
  return kernels;
}

// With few rows the weights are what a product waits for, and VNNI reads them as fast; the sums are exact either way.
inline void w8a8_gemm(const GemmJob& job, int part, int parts, std::byte* scratch) {
  const auto multiply = job.rows.group < tile_from ? &cpu_avx512::vnni::block_gemm_of<DType::w8a8> : &tile_gemm<W8a8Products>;
  multiply(job, part, parts, scratch);
}

inline KernelTable with_tiles(KernelTable table) {
  table.q8 = block_kernels<DType::q8>();
  table.q4 = block_kernels<DType::q4>();
  table.q4_128 = block_kernels<DType::q4_128>();
  table.w8a8 = cpu_avx512::vnni::block_kernels<DType::w8a8>();
  table.w8a8.row_group = tile_height;
  table.w8a8.gemm = &w8a8_gemm;
  table.w8a8.gemm_scratch = &tile_gemm_scratch;
  table.int8_dot = true;
  return table;
}
