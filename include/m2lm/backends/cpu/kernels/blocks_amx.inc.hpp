// Products by AMX with weights in blocks (q8, q4, q4_128): tiles of 16 rows of x and a strip of 16 outputs. Included inside a namespace of
// level amx and its target region, behind gemm_amx.
//
// A panel is unpacked to signed bytes once for all rows that pass by it. The sums of a block are exact and go through L1 to the vector unit,
// which gives what the kernels of the other levels give, in their order: bit by bit the same.

// Rows of a tile from which on a product of tiles is worth its set-up; with fewer the kernels of VNNI.
inline constexpr std::int64_t tile_from = 5;
// Inputs of a panel that are unpacked at once: 16 KB, which stay in L1 with a tile of rows (8 KB) while that passes by both strips.
inline constexpr std::int64_t unpacked_inputs = 512;

// Between tile instructions the vector unit does one operation on 16 floats per cycle, but two on integers (measured on a Xeon with AMX). So a
// sum s of a block, |s| <= 32 · 127 · 128 < 2^22, becomes a float by adding it to the bits of 1.5 · 2^23, whose unit in the last place is 1; what
// that adds leaves again in the multiplication by the weight's scale w, which rounds once: fma(1.5 · 2^23 + s, w, -1.5 · 2^23 · w) = round(s · w).
inline constexpr float shift_of_sums = 12582912.0F;

// Blocks [first, first + count) of a strip, ready for tiles.
struct UnpackedStrip {
  std::byte* values;  ///< signed bytes [8][16][4] of each 32 inputs
  float* scales;      ///< [count][2][16]: the weights' scales, and times -shift_of_sums
};

// Whether all scales are finite: others do not survive the shift.
template <DType format>
inline bool unpack(const std::byte* strip, std::int64_t first, std::int64_t count, const UnpackedStrip& to) {
  constexpr QuantisedFormat layout = quantised_format(format);
  constexpr std::int64_t pieces = layout.scale_inputs / 32;
  std::byte* values = to.values;
  Vec nothing = set(0.0F);
  for (std::int64_t b = 0; b < count; ++b) {
    const std::byte* from = strip + (first + b) * tile_bytes(format);
    const Vec scale = load_halves(from + tile_values_bytes(format));
    nothing = nothing + (scale - scale);
    store(to.scales + b * 2 * width, scale);
    store(to.scales + (b * 2 + 1) * width, scale * set(-shift_of_sums));
    for (std::int64_t p = 0; p < pieces; ++p, from += layout.piece_bytes(), values += strip_width * 32) {
      if constexpr (layout.bits == 8) {
        M2LM_UNROLL
        for (int j = 0; j < 8; ++j) _mm512_storeu_si512(values + j * 64, _mm512_xor_si512(_mm512_loadu_si512(from + j * 64), _mm512_set1_epi8(-128)));
      } else {
        const __m512i low = _mm512_set1_epi8(15), offset = _mm512_set1_epi8(8);
        M2LM_UNROLL
        for (int j = 0; j < 4; ++j) {
          const __m512i bytes = _mm512_loadu_si512(from + j * 64);
          _mm512_storeu_si512(values + j * 64, _mm512_sub_epi8(_mm512_and_si512(bytes, low), offset));
          _mm512_storeu_si512(values + (4 + j) * 64, _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(bytes, 4), low), offset));
        }
      }
    }
  }
  return reduce_add(nothing) == 0.0F;
}

// Numbers of the rows of a tile. Sums are indexed by these alone: with the index of a loop g++ 12 keeps them in memory, and every block would
// store and load them.
using TileRows = std::make_index_sequence<static_cast<std::size_t>(tile_height)>;

// sum[r] += products[r][·] · of_weights · scales[r]
template <std::size_t... r>
[[gnu::always_inline]] inline void add_scaled(const std::int32_t* products, const float* of_weights, const float* scales, Vec (&sum)[tile_height],
                                              std::index_sequence<r...>) {
  const __m512i shift = _mm512_castps_si512(set(shift_of_sums));
  const Vec weight_scale = load(of_weights), unshift = load(of_weights + width);
  const auto shifted = [&](std::size_t i) { return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_load_si512(products + i * width), shift)); };
  ((sum[r] = fma(fma(shifted(r), weight_scale, unshift), set(scales[r]), sum[r])), ...);
}
template <std::size_t... r>
[[gnu::always_inline]] inline void load_rows(const float* c, Vec (&sum)[tile_height], std::index_sequence<r...>) {
  ((sum[r] = c ? load(c + r * panel_width) : set(0.0F)), ...);
}
template <std::size_t... r>
[[gnu::always_inline]] inline void store_rows(float* c, const Vec (&sum)[tile_height], std::index_sequence<r...>) {
  (store(c + r * panel_width, sum[r]), ...);
}

// c[16][16] (+)= a tile of rows · blocks [first, first + count) of a strip. `products`: room for two tiles of sums. requires count > 0.
template <DType format>
[[gnu::noinline]] void multiply_blocks(const QuantisedRows& rows, std::int64_t row, const UnpackedStrip& strip, std::int64_t first, std::int64_t count,
                                       float* c, std::int32_t* products) {
  constexpr QuantisedFormat layout = quantised_format(format);
  constexpr std::int64_t chunks = layout.scale_inputs / layout.chunk, x_step = tile_height * layout.chunk, w_step = strip_width * layout.chunk;
  constexpr std::int64_t tile_sums = tile_height * strip_width;
  const auto* x = reinterpret_cast<const std::byte*>(rows.values) + (rows.first_chunk(row) + first * chunks * tile_height) * layout.chunk;
  const std::byte* w = strip.values;
  const float* scales = rows.scales + rows.first_block(row) + first * tile_height;
  const float* of_weights = strip.scales;
  Vec sum[tile_height];
  load_rows(first == 0 ? nullptr : c, sum, TileRows());
  const auto multiply = [&]<int tile>() {
    tile_zero<tile>();
    M2LM_UNROLL
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk, x += x_step, w += w_step) {
      tile_load<4 + tile>(x, layout.chunk);
      tile_load<6 + tile>(w, tile_row_bytes);
      tile_dot_signed_bytes<tile, 4 + tile, 6 + tile>();
    }
  };
  // A tile's sums leave it just before the block that takes its place: so the tile unit is busy while the vector unit scales.
  multiply.template operator()<0>();
  if (count > 1) multiply.template operator()<1>();
  for (std::int64_t b = 0; b < count; b += 2, scales += 2 * tile_height, of_weights += 4 * width) {
    tile_store<0>(products, tile_row_bytes);
    if (b + 2 < count) multiply.template operator()<0>();
    add_scaled(products, of_weights, scales, sum, TileRows());
    if (b + 1 == count) break;
    tile_store<1>(products + tile_sums, tile_row_bytes);
    if (b + 3 < count) multiply.template operator()<1>();
    add_scaled(products + tile_sums, of_weights + 2 * width, scales + tile_height, sum, TileRows());
  }
  store_rows(c, sum, TileRows());
}

// Rows that pass by a panel.
inline std::int64_t block_rows_at_once(std::int64_t k) {
  const std::int64_t fit = rows_in_cache / (k > 0 ? k : 1) / tile_height * tile_height;
  return fit < tile_height ? tile_height : fit > most_rows ? most_rows : fit;
}

inline constexpr std::int64_t products_bytes = 2 * tile_height * tile_row_bytes, unpacked_values = unpacked_inputs * strip_width;
inline constexpr std::int64_t unpacked_scales = unpacked_inputs / block_values * 2 * strip_width;  // at most: floats of a strip

inline std::size_t block_gemm_scratch(std::int64_t m) {
  const std::int64_t rows = m < most_rows ? round_up(m, tile_height) : most_rows;
  return static_cast<std::size_t>(products_bytes + 2 * (unpacked_values + unpacked_scales * 4) + rows * panel_width * 4);
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
  auto* scales = reinterpret_cast<float*>(scratch + products_bytes + 2 * unpacked_values);
  const UnpackedStrip unpacked[2] = {{scratch + products_bytes, scales}, {scratch + products_bytes + unpacked_values, scales + unpacked_scales}};
  float* sums = scales + 2 * unpacked_scales;

  TileShapes shapes;
  for (int tile = 0; tile < 2; ++tile) shapes.set(tile, tile_height, tile_row_bytes);    // sums
  for (int tile = 4; tile < 6; ++tile) shapes.set(tile, tile_height, layout.chunk);      // rows
  for (int tile = 6; tile < 8; ++tile) shapes.set(tile, layout.chunk / 4, tile_row_bytes);  // weights
  const TileUnit unit(shapes);

  const bool past_caches = writes_past_caches(job, parts);
  constexpr std::int64_t blocks_at_once = unpacked_inputs / layout.scale_inputs;
  const std::int64_t at_once = block_rows_at_once(job.k);
  for (std::int64_t row0 = my_rows.begin; row0 < my_rows.end; row0 += at_once) {
    const std::int64_t rows = my_rows.end - row0 < at_once ? my_rows.end - row0 : at_once;
    const std::int64_t alone = job.k == 0 ? rows : rows % tile_height < tile_from ? rows % tile_height : 0, in_tiles = rows - alone;
    for (std::int64_t panel = my_panels.begin; panel < my_panels.end; ++panel) {
      const std::byte* strips[2] = {job.w + panel * 2 * strip_bytes, job.w + (panel * 2 + 1) * strip_bytes};
      bool finite[2] = {true, true};
      const auto with_vectors = [&](std::int64_t r, std::int64_t count, int half) {
        cpu_avx512::vnni::multiply_rows<format>(job.rows, row0 + r, count, strips[half], sums + r * panel_width + half * strip_width);
      };
      for (std::int64_t first = 0; first < job.rows.blocks; first += blocks_at_once) {
        const std::int64_t count = job.rows.blocks - first < blocks_at_once ? job.rows.blocks - first : blocks_at_once;
        const bool last = first + count == job.rows.blocks;
        for (int half = 0; half < 2; ++half) finite[half] = unpack<format>(strips[half], first, count, unpacked[half]) && finite[half];
        for (std::int64_t r = 0; r < in_tiles; r += tile_height) {
          const std::int64_t here = in_tiles - r < tile_height ? in_tiles - r : tile_height;
          for (int half = 0; half < 2; ++half) {
            if (last && !past_caches && (half == 0 || !job.gated))  // what is written soon
              for (std::int64_t i = r; i < r + here; ++i) __builtin_prefetch(job.y + (row0 + i) * job.ldy + panel * step + half * strip_width, 1, 2);
            multiply_blocks<format>(job.rows, row0 + r, unpacked[half], first, count, sums + r * panel_width + half * strip_width, products);
            if (last && !finite[half]) with_vectors(r, here, half);
          }
          if (last) finish_panel(job, sums + r * panel_width, row0 + r, here, panel, past_caches);
        }
      }
      if (alone == 0) continue;
      for (int half = 0; half < 2; ++half) with_vectors(in_tiles, alone, half);
      finish_panel(job, sums + in_tiles * panel_width, row0 + in_tiles, alone, panel, past_caches);
    }
  }
  if (past_caches) _mm_sfence();
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
  table.w8a8.gemm_scratch = &tile_gemm_scratch<W8a8Products>;
  table.int8_dot = true;
  return table;
}
