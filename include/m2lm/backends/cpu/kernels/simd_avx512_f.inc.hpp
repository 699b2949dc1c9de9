// The part of simd_avx512 that differs without BF16 instructions.

inline constexpr bool native_bf16 = false;
inline void convert_bf16(const float* x, Bf16* y) {
  for (int i = 0; i < width; ++i) y[i] = m2lm::to_bf16(x[i]);
}
