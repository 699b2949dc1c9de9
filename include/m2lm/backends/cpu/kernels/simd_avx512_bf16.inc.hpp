// The part of simd_avx512 that differs with BF16 instructions.

inline void convert_bf16(const float* x, Bf16* y) {
  const __m256bh v = _mm512_cvtneps_pbh(_mm512_loadu_ps(x));
  __builtin_memcpy(static_cast<void*>(y), &v, sizeof(v));
}
inline void store_bf16_pair(Vec a, Vec b, std::uint16_t* y) {
  const __m512bh v = _mm512_cvtne2ps_pbh(b, a);
  __builtin_memcpy(y, &v, sizeof(v));
}
inline Vec dot_bf16_pairs(Vec sum, const std::uint16_t* x, const std::uint16_t* w) {
  std::int32_t pair;
  __builtin_memcpy(&pair, x, sizeof(pair));
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_loadu_si512(w));
}
