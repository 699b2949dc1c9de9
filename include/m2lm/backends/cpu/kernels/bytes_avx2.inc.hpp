// What the products of blocks share at level avx2. Included inside a namespace of the level and its target region.

inline constexpr int block_rows = 4;    // of a tile
inline constexpr int rows_in_turn = 2;  // whose products are interleaved

using Ints = __m256i;

inline Vec load_halves(const std::byte* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store_bytes(std::int8_t* to, Vec v) {
  const __m256i words = _mm256_cvtps_epi32(v);
  const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(shorts, shorts));
}
inline Ints load_ints(const std::byte* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Ints low_nibbles(Ints bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
inline Ints high_nibbles(Ints bytes) { return _mm256_and_si256(_mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15)); }
inline Ints set_ints(std::int32_t x) { return _mm256_set1_epi32(x); }
inline Vec to_vec(Ints x) { return _mm256_cvtepi32_ps(x); }
inline Ints multiply_bytes(Ints w, Ints x) { return _mm256_maddubs_epi16(w, x); }
inline Ints add_shorts(Ints a, Ints b) { return _mm256_add_epi16(a, b); }
inline Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
// Pairs of 16 bits, times `factor`, added.
inline Ints add_pairs(Ints shorts, short factor) { return _mm256_madd_epi16(shorts, _mm256_set1_epi16(factor)); }
