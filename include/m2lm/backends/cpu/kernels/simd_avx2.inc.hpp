// Eight f32 lanes: AVX2 + FMA. Included inside a level's namespace and target region.

using Vec = __m256;
inline constexpr int width = 8;
inline constexpr int tile_rows = 3;

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline void store_past_caches(float* p, Vec v) { _mm256_stream_ps(p, v); }
inline Vec set(float x) { return _mm256_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec round(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec scale_by_power(Vec x, Vec n) {
  const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(x, _mm256_castsi256_ps(bits));
}
// For powers of two: t, or something below -126 that the next two can take; t - floor(t), in [0, 1]; x · 2^floor(t), 0 where t < -126.
inline Vec bounded(Vec t) { return _mm256_max_ps(set(-127.0F), t); }  // NaN stays
inline Vec fraction(Vec t) { return _mm256_sub_ps(t, _mm256_floor_ps(t)); }
inline Vec scale_by_floor(Vec x, Vec t) { return scale_by_power(x, _mm256_floor_ps(t)); }
inline Vec zero_where_below(Vec x, Vec limit, Vec value) { return _mm256_and_ps(_mm256_cmp_ps(x, limit, _CMP_GE_OQ), value); }
inline float reduce_add(Vec v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float reduce_max(Vec v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline __m256i load_bits(const std::uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Vec load_bf16_even(const std::uint16_t* p) { return _mm256_castsi256_ps(_mm256_slli_epi32(load_bits(p), 16)); }
inline Vec load_bf16_odd(const std::uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_and_si256(load_bits(p), _mm256_set1_epi32(static_cast<int>(0xffff0000U))));
}
