// Prefill by AMX with weights in blocks of 32 inputs (q8, q4). Included inside a namespace of level amx and its target region, behind gemm_amx.
//
// A weight, scale · value, is exact in f32 and rounded once to bf16; x is rounded to bf16 as for weights in bf16. So a sum stays in its tile over
// many blocks, where the exact products of blocks_amx take theirs out after every one, and each output is one chain of TDPBF16PS over k in
// ascending order. 512 inputs of a panel become tiles, in L1, before they are multiplied by all rows of the walk; to make them between the tile
// instructions of those before them takes as long.

using cpu_avx512::vnni::load_halves;

/// Word i of the lower half of a register, then word i of the upper one.
alignas(64) inline constexpr std::uint16_t words_in_turn[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                                8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
/// What four bits stand for in q4.
alignas(64) inline constexpr float value_of_half[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

[[gnu::always_inline]] inline void store_pairs(Vec even, Vec odd, std::byte* to) {
  const __m512i words = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
  _mm512_storeu_si512(to, _mm512_maskz_permutexvar_epi16(0xFFFFFFFFU, _mm512_load_si512(words_in_turn), words));
}

/// A block of 16 outputs as a tile [16][16][2]: inputs 2i and 2i + 1 of output r at [i][r].
template <DType format>
[[gnu::always_inline]] inline void dequantise_block(const std::byte* from, std::byte* to) {
  const Vec scale = load_halves(from + tile_values_bytes(format));
  if constexpr (format == DType::q4) {
    const Vec values = load(value_of_half);
    M2LM_UNROLL
    for (int j = 0; j < 4; ++j) {
      const __m512i bytes = _mm512_loadu_si512(from + j * 64);
      // Of the index the last four bits count: half a byte.
      const auto weight = [&](unsigned half) __attribute__((always_inline)) {
        return _mm512_maskz_permutexvar_ps(0xFFFFU, _mm512_maskz_srli_epi32(0xFFFFU, bytes, 4 * half), values) * scale;
      };
      store_pairs(weight(0), weight(2), to + 2 * j * tile_row_bytes);
      store_pairs(weight(4), weight(6), to + (2 * j + 1) * tile_row_bytes);
      store_pairs(weight(1), weight(3), to + (8 + 2 * j) * tile_row_bytes);
      store_pairs(weight(5), weight(7), to + (8 + 2 * j + 1) * tile_row_bytes);
    }
  } else {
    const Vec offset = scale * set(-static_cast<float>(quantised_format(format).offset()));
    const __m512i low = _mm512_set1_epi32(255);
    M2LM_UNROLL
    for (int j = 0; j < 8; ++j) {
      const __m512i bytes = _mm512_loadu_si512(from + j * 64);
      const auto weight = [&](unsigned byte) __attribute__((always_inline)) {
        const __m512i value = _mm512_and_si512(_mm512_maskz_srli_epi32(0xFFFFU, bytes, 8 * byte), low);
        return fma(_mm512_maskz_cvtepi32_ps(0xFFFFU, value), scale, offset);  // exact, as scale · (value - 128) is
      };
      store_pairs(weight(0), weight(1), to + 2 * j * tile_row_bytes);
      store_pairs(weight(2), weight(3), to + (2 * j + 1) * tile_row_bytes);
    }
  }
}

/// A panel's tiles of bf16 made of blocks, one strip behind the other.
template <DType format>
struct DequantisedProducts : Bf16Products {
  static constexpr bool dequantises = true;
  static constexpr QuantisedFormat layout = quantised_format(format);
  static constexpr std::int64_t row_stride = tile_row_bytes, panel_step = tile_height * tile_row_bytes;
  static constexpr std::int64_t second_strip(std::int64_t) { return block_steps * panel_step; }
  static constexpr std::int64_t panel_bytes(std::int64_t k) { return 2 * layout.strip_bytes(k); }
  /// Blocks [begin, end) of both strips of a panel. While they are made, those behind them are asked for.
  static void dequantise(const std::byte* panel, std::int64_t k, std::int64_t begin, std::int64_t end, std::byte* to) {
    constexpr std::int64_t bytes = tile_bytes(format);
    for (int half = 0; half < 2; ++half) {
      const std::byte* from = panel + half * layout.strip_bytes(k) + begin * bytes;
      std::byte* tile = to + half * second_strip(k);
      for (std::int64_t b = begin; b < end; ++b, from += bytes, tile += panel_step) {
        for (std::int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + block_steps * bytes + line, 0, 2);
        dequantise_block<format>(from, tile);
      }
    }
  }
};

/// The kernels of prefill for weights in blocks.
template <DType format>
FormatKernels prefill_kernels() {
  return {.bf16_activations = true,
          .k_step = quantised_format(format).k_step,
          .quantise = &round_row,
          .row_group = tile_height,
          .value_bytes = 2,
          .gemm = &tile_gemm<DequantisedProducts<format>>,
          .gemm_scratch = &tile_gemm_scratch<DequantisedProducts<format>>};
}
