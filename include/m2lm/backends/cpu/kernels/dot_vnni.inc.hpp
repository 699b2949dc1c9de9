// Products of blocks by VPDPBUSD: four products of unsigned and signed bytes, added to 32 bits without saturation.
// Included inside a namespace of a level, behind its dot_four, and its target region.

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
  // out[r] = starts[r] + Σ w · (block r of x). The rows take turns: each is a chain of eight products that wait for each other.
  template <int rows>
  [[gnu::always_inline]] void dot(const std::int8_t* x, const std::int32_t* starts, Vec (&out)[rows]) const {
    Ints sum[rows];
    M2LM_UNROLL
    for (int r = 0; r < rows; ++r) sum[r] = set_ints(starts[r]);
    M2LM_UNROLL
    for (int j = 0; j < 8; ++j)
      M2LM_UNROLL
      for (int r = 0; r < rows; ++r) sum[r] = dot_four(sum[r], w[j], x + r * block_values + 4 * j);
    M2LM_UNROLL
    for (int r = 0; r < rows; ++r) out[r] = to_vec(sum[r]);
  }
};
