// Four f32 lanes by the compiler's vector extension: every target, no instruction assumed. Included inside a level's namespace.

using Vec [[gnu::vector_size(16)]] = float;
using Mask [[gnu::vector_size(16)]] = int;
inline constexpr int width = 4;
inline constexpr int tile_rows = 1;

inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }
inline void store_past_caches(float* p, Vec v) { store(p, v); }
inline Vec set(float x) { return Vec{x, x, x, x}; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline Vec round(Vec x) {  // to nearest even, for |x| < 2^22
  const Vec magic = set(12582912.0F);
  return (x + magic) - magic;
}
inline Vec scale_by_power(Vec x, Vec n) {
  const Mask bits = (__builtin_convertvector(n, Mask) + 127) << 23;
  return x * (Vec)bits;
}
// For powers of two: t, or something below -126 that the next two can take; t - n and x · 2^n for the whole number n = floor(t), or n =
// t - 1; the latter is 0 where t < -126.
inline Vec bounded(Vec t) { return max(set(-126.5F), t); }  // NaN stays
inline Vec floor_of(Vec t) { return round(t - set(0.5F)); }
inline Vec fraction(Vec t) { return t - floor_of(t); }
inline Vec scale_by_floor(Vec x, Vec t) { return scale_by_power(x, floor_of(t)); }
inline Vec zero_where_below(Vec x, Vec limit, Vec value) { return (Vec)((x >= limit) & (Mask)value); }
inline float reduce_add(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline float reduce_max(Vec v) {
  const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
}
inline Mask load_bits(const std::uint16_t* p) {
  Mask bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return bits;
}
inline Vec load_bf16_even(const std::uint16_t* p) { return (Vec)(load_bits(p) << 16); }
inline Vec load_bf16_odd(const std::uint16_t* p) { return (Vec)(load_bits(p) & static_cast<int>(0xffff0000U)); }
