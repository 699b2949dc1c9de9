// Sixteen f32 lanes: AVX-512, without and with BF16. Included inside a level's namespace and target region.
// The maskz forms with a full mask compile to the plain instructions; g++ 12 warns of an uninitialised value inside its own
// header for the plain forms (_mm512_undefined_ps), which -Werror would turn on the user.

using Vec = __m512;
inline constexpr int width = 16;
inline constexpr int tile_rows = 12;
inline constexpr __mmask16 all_lanes = 0xffff;

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
// Past the caches, which need not read the line then. requires p on a multiple of a vector.
inline void store_past_caches(float* p, Vec v) { _mm512_stream_ps(p, v); }
inline Vec set(float x) { return _mm512_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm512_maskz_max_ps(all_lanes, a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_maskz_min_ps(all_lanes, a, b); }
inline Vec round(Vec x) { return _mm512_maskz_roundscale_ps(all_lanes, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec scale_by_power(Vec x, Vec n) { return _mm512_maskz_scalef_ps(all_lanes, x, n); }
// For powers of two: t - floor(t), 0 for infinity; x · 2^floor(t), 0 where t < -126.
inline Vec bounded(Vec t) { return t; }
inline Vec fraction(Vec t) { return _mm512_maskz_reduce_ps(all_lanes, t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
inline Vec scale_by_floor(Vec x, Vec t) { return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(t, set(-126.0F), _CMP_NLT_UQ), x, t); }
inline Vec zero_where_below(Vec x, Vec limit, Vec value) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_GE_OQ), value); }
template <int half>
inline __m256 half_of(Vec v) {
  return _mm512_maskz_extractf32x8_ps(0xff, v, half);
}
inline float reduce_add(Vec v) {
  const __m256 a = _mm256_add_ps(half_of<0>(v), half_of<1>(v));
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float reduce_max(Vec v) {
  const __m256 a = _mm256_max_ps(half_of<0>(v), half_of<1>(v));
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline Vec load_bf16_even(const std::uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(all_lanes, _mm512_loadu_si512(p), 16));
}
inline Vec load_bf16_odd(const std::uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(static_cast<int>(0xffff0000U))));
}
