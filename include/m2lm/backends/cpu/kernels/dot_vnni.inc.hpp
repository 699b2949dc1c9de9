// Products of blocks by VPDPBUSD: four products of unsigned and signed bytes, added to 32 bits without saturation.
// Included inside a namespace of a level, behind its dot_four, and its target region.

// 32 inputs of `width` outputs.
template <std::int64_t bits>
struct BlockWeights {
  Ints w[8];

  [[gnu::always_inline]] explicit BlockWeights(const std::byte* p) {
    if constexpr (bits == 8) {
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
  // sum[r] += Σ w · (32 inputs of row r of x). The rows take turns: each is a chain of eight products that wait for each other.
  template <std::int64_t stride, int rows>
  [[gnu::always_inline]] void add(const std::int8_t* x, Ints (&sum)[rows]) const {
    M2LM_UNROLL
    for (int j = 0; j < 8; ++j)
      M2LM_UNROLL
      for (int r = 0; r < rows; ++r) sum[r] = dot_four(sum[r], w[j], x + r * stride + 4 * j);
  }
};
