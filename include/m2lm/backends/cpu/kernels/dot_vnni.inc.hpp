// Products of blocks by VPDPBUSD: four products of unsigned and signed bytes, added to 32 bits without saturation.
// Included inside a namespace of a level, behind its dot_four, and its target region.

inline Ints broadcast_four(const std::int8_t* x) {
  std::int32_t four;
  __builtin_memcpy(&four, x, sizeof(four));
  return set_ints(four);
}

// 32 inputs of `width` outputs.
template <DType format>
struct BlockWeights {
  Ints w[8];

  [[gnu::always_inline]] explicit BlockWeights(const std::byte* p) {
    if constexpr (format == DType::q8) {
      M2LM_UNROLL
      for (int j = 0; j < 8; ++j) w[j] = load_ints(p + j * 64);
    } else {
      M2LM_UNROLL
      for (int j = 0; j < 4; ++j) {
        const Ints bytes = load_ints(p + j * 64);
        w[j] = low_nibbles(bytes);
        w[4 + j] = high_nibbles(bytes);
      }
    }
  }
  // start + Σ w · x.
  [[gnu::always_inline]] Vec dot(const std::int8_t* x, std::int32_t start) const {
    Ints sum = set_ints(start);
    M2LM_UNROLL
    for (int j = 0; j < 8; ++j) sum = dot_four(sum, w[j], broadcast_four(x + 4 * j));
    return to_vec(sum);
  }
};
