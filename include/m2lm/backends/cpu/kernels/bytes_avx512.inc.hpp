// Vectors of bytes at level avx512, for products of blocks. Included inside the level's namespace and target region.

inline constexpr int block_rows = 16;   // of a tile
inline constexpr int rows_in_turn = 4;  // whose products are interleaved: with 16 sums and 8 vectors of weights that fills the registers

using Ints = __m512i;

inline Vec load_halves(const std::byte* p) {
  return _mm512_maskz_cvtph_ps(all_lanes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_bytes(std::int8_t* to, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(all_lanes, _mm512_maskz_cvtps_epi32(all_lanes, v)));
}
inline Ints load_ints(const std::byte* p) { return _mm512_loadu_si512(p); }
inline Ints low_nibbles(Ints bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
inline Ints high_nibbles(Ints bytes) { return _mm512_and_si512(_mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15)); }
inline Ints set_ints(std::int32_t x) { return _mm512_set1_epi32(x); }
inline Vec to_vec(Ints x) { return _mm512_maskz_cvtepi32_ps(all_lanes, x); }
inline Ints multiply_bytes(Ints w, Ints x) { return _mm512_maddubs_epi16(w, x); }
inline Ints add_shorts(Ints a, Ints b) { return _mm512_add_epi16(a, b); }
inline Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
// Pairs of 16 bits, times `factor`, added.
inline Ints add_pairs(Ints shorts, short factor) { return _mm512_madd_epi16(shorts, _mm512_set1_epi16(factor)); }
